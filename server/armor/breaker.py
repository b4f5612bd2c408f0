"""A circuit breaker for one endpoint: after many failures nobody asks for a while, then one call tries."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

WINDOW_S = 10.0  # failures are counted in it
MIN_CALLS = 20  # fewer say nothing about a share
FAILED_SHARE = 0.5
IN_A_ROW = 5
OPEN_S = 5.0

State = Literal["closed", "half open", "open"]


class Breaker:
    """Give each call a ticket by `enter`, and `leave` with it exactly once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.state: State = "closed"
        self._ticket = 0  # of the present state: what calls of an earlier one say no longer counts
        self._recent: deque[tuple[float, bool]] = deque()  # when a call failed or not
        self._num_failed = 0  # of them
        self._in_a_row = 0
        self._until = 0.0

    def enter(self) -> int | None:
        """A ticket, or None if the call must not be made."""
        if self.state == "closed":
            return self._ticket
        if self.state == "open" and self._clock() >= self._until:
            self._become("half open")
            return self._ticket
        return None

    def refuses(self) -> bool:
        """Whether `enter` would give no ticket now."""
        return self.state == "half open" or (self.state == "open" and self._clock() < self._until)

    def leave(self, ticket: int, is_ok: bool | None) -> None:
        """is_ok: whether the endpoint works; None: the call said nothing of that, or was cancelled."""
        if ticket != self._ticket:
            return
        if self.state == "half open":
            if is_ok:
                self._become("closed")
            else:
                self._open(OPEN_S if is_ok is False else 0.0)  # after no word, the next call tries
        elif is_ok is not None:
            self._count(is_ok)

    def _count(self, is_ok: bool) -> None:
        now = self._clock()
        self._recent.append((now, is_ok))
        self._num_failed += not is_ok
        self._in_a_row = 0 if is_ok else self._in_a_row + 1
        while self._recent[0][0] <= now - WINDOW_S:
            self._num_failed -= not self._recent.popleft()[1]
        total = len(self._recent)
        if self._in_a_row >= IN_A_ROW or (total >= MIN_CALLS and self._num_failed >= FAILED_SHARE * total):
            self._open(OPEN_S)

    def _open(self, for_s: float) -> None:
        self._until = self._clock() + for_s
        self._become("open")

    def _become(self, state: State) -> None:
        self.state = state
        self._ticket += 1
        self._recent.clear()
        self._num_failed = self._in_a_row = 0
