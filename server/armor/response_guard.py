"""The deltas of one choice, of which nothing leaves that a check has not approved.

`strict` checks the whole answer at its end. `window` checks what has come, up to n, and releases up to
n - hold_back: whatever is no longer than that is seen whole before its first character leaves. Windows grow,
one check is on its way at a time, generation goes on meanwhile. `optimistic` releases at once and cuts late.
What a check is and what its failure means is the caller's: an exception ends the choice.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.ledger import Ledger
from cabochon.server.armor.safe_cut import MAX_RUN, has_words, safe_cut
from cabochon.server.armor.verdicts import Mode
from cabochon.server.generation import Delta

MIN_WORDS = 3  # of a window before the end: the injection filter matches nothing in fewer
RETRY_CHARS = 16  # at least that must come before a text without a place to cut is looked at again
NEVER = sys.maxsize

Approve = Callable[[str, str], Awaitable[str]]  # (released before, text) -> the text, or what to show instead
Observe = Callable[[float], None]  # seconds that released text has waited


class Blocked(Exception):
    """A check found something: the text must not be shown. Raised by Approve."""

    def __init__(self, filters: tuple[str, ...] = ()) -> None:
        """filters: that matched; never what they found."""
        super().__init__(*filters)
        self.filters = filters


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How much of an answer is checked at once. Raises ConfigError."""

    first_chars: int = 160  # to be released by the first check; each next window is twice as long, up to
    max_chars: int = 512  # this, or under pressure up to
    wide_chars: int = 2048  # this
    hold_back_chars: int = 64  # checked, but not released: the longest that may not leave in part
    context_chars: int = 256  # of the released text, shown to the next check
    max_hold_s: float = 2.0  # a window is not waited for longer; under pressure in proportion to its length
    pressure: Callable[[], float] = lambda: 0.0  # on the quota of checks: 0 none .. 1 all of it is used

    def __post_init__(self) -> None:
        if not 1 <= self.first_chars <= self.max_chars:
            raise ConfigError(
                "windows must grow from at least 1 character, got"
                f" {self.first_chars} to {self.max_chars}: put them in order"
            )
        if self.hold_back_chars < 1 or self.context_chars < 0 or self.max_hold_s <= 0:
            raise ConfigError(
                "hold-back and longest hold must be above 0 and the context not below, got"
                f" {self.hold_back_chars}, {self.max_hold_s} and {self.context_chars}: raise them"
            )

    @property
    def longest_chars(self) -> int:
        """Of a window now."""
        share = min(1.0, max(0.0, self.pressure()))
        return self.max_chars + round(share * max(0, self.wide_chars - self.max_chars))


async def guarded(
    deltas: AsyncGenerator[Delta, None],
    approve: Approve,
    *,
    mode: Mode,
    windows: Windows,
    observe: Observe | None = None,
) -> AsyncGenerator[Delta, None]:
    """The deltas of one choice as they may be shown. Closing it closes them: the engine's request is aborted.

    approve(context, text): `context` is the end of what was released. One call at a time; it is cancelled
    when the choice ends. After Blocked there is one last delta, its reason content_filter; in `optimistic` a
    rewrite is Blocked. Any other exception, of approve or of the deltas, passes; nothing is released then.
    """
    if mode == "off":
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta
        return
    guard = _Guard(deltas, approve, mode, windows, observe)
    try:
        while not guard.is_over:
            shown = guard.step()
            if shown is not None:
                yield shown
            elif not guard.is_over:
                await guard.changed.wait()
    except Blocked:
        await guard.close()
        yield guard.ledger.blocked()
    finally:
        await guard.close()


@dataclass(frozen=True, slots=True)
class _Check:
    """On its way. cut: how much of the text it may release if more follows."""

    text: str
    cut: int
    verdict: asyncio.Future[str]


class _Guard:
    """Reads ahead, and says in steps what may be shown. `changed` is set when another step is worth it."""

    def __init__(
        self,
        deltas: AsyncGenerator[Delta, None],
        approve: Approve,
        mode: Mode,
        windows: Windows,
        observe: Observe | None,
    ) -> None:
        self.ledger = Ledger()
        self.changed = asyncio.Event()
        self.is_over = False
        self._deltas, self._approve, self._windows, self._observe = deltas, approve, windows, observe
        self._is_optimistic, self._is_strict = mode == "optimistic", mode == "strict"
        self._unshown = ""  # optimistic only: what the next step shows
        self._unchecked = ""  # all that came and is not released; optimistic: not behind a check
        self._context = ""
        self._num_seen = 0  # characters of _unchecked that the last check saw
        self._is_approved = False  # whether those may be shown, should no more come
        self._window = windows.first_chars
        self._wanted = NEVER if self._is_strict else self._window + windows.hold_back_chars  # of _unchecked
        self._check: _Check | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_late = False  # the longest hold is over
        self._source = asyncio.create_task(self._read())
        self._source.add_done_callback(self._wake)

    def step(self) -> Delta | None:
        """The next delta to show, if there is one now. Raises what ends the choice."""
        self.changed.clear()
        has_ended = self._source.done()
        if has_ended:
            self._source.result()
        if self._check is not None and self._check.verdict.done():
            shown = self._settle(self._check)
            if shown is not None or self.is_over:
                return shown
        if self._check is None:
            size = len(self._unchecked)
            if has_ended and (size == 0 or (self._is_approved and size == self._num_seen)):
                return self._finish(size, self._unchecked)
            cut = size if has_ended else self._due_cut(size)
            if cut > 0:
                self._start_check(cut)
        return self._show() if self._unshown else None  # last: who reads slowly must not put checks off

    async def close(self) -> None:
        """End it all: nothing runs on behind it."""
        if self._timer is not None:
            self._timer.cancel()
        tasks: list[asyncio.Future[Any]] = [self._source]
        if self._check is not None:
            tasks.append(self._check.verdict)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._deltas.aclose()  # where the reading had not begun

    async def _read(self) -> None:
        now = asyncio.get_running_loop().time
        async with aclosing(self._deltas):
            async for delta in self._deltas:
                self.ledger.take(delta, now())
                self._unchecked += delta.text
                if self._is_optimistic:
                    self._unshown += delta.text
                if self._timer is None and self._unchecked:
                    self._start_timer()
                if self._unshown or len(self._unchecked) >= self._wanted:
                    self.changed.set()

    def _wake(self, _: object) -> None:
        self.changed.set()

    def _start_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_strict:
            windows = self._windows
            hold_s = windows.max_hold_s * windows.longest_chars / windows.max_chars
            self._timer = asyncio.get_running_loop().call_later(hold_s, self._be_late)

    def _be_late(self) -> None:
        self._is_late = True
        if self._check is None:
            self._wanted = self._least()
            self.changed.set()

    def _least(self) -> int:
        """Fewer characters than that have nothing to release, or nothing new."""
        return max(self._windows.hold_back_chars, self._num_seen) + 1

    def _due_cut(self, size: int) -> int:
        """How much a check that starts now could release; 0: it is not time."""
        if size < self._wanted:
            return 0
        hold_back = self._windows.hold_back_chars
        cut = safe_cut(self._unchecked, size - hold_back)
        if cut == 0 or not (size > MAX_RUN or has_words(self._unchecked, MIN_WORDS)):
            retry_at = size + max(RETRY_CHARS, size // 4)  # so all looks together are linear in the text
            self._wanted = min(retry_at, MAX_RUN + hold_back + 1)  # there it has a place
            return 0
        return cut

    def _start_check(self, cut: int) -> None:
        verdict = asyncio.ensure_future(self._approve(self._context, self._unchecked))
        verdict.add_done_callback(self._wake)
        self._check = _Check(self._unchecked, cut, verdict)
        self._num_seen, self._is_approved = len(self._unchecked), False
        self._window = min(2 * self._window, self._windows.longest_chars)
        self._wanted, self._is_late = NEVER, False
        self._start_timer()

    def _settle(self, check: _Check) -> Delta | None:
        """What a check that came back lets go."""
        self._check = None
        self.changed.set()  # what came meanwhile may be due
        approved, text = check.verdict.result(), check.text
        is_rewritten = approved != text
        if is_rewritten and self._is_optimistic:
            raise Blocked
        is_whole = self._source.done() and len(self._unchecked) == len(text)
        kept = "" if is_whole else text[check.cut :]
        if not approved.endswith(kept):  # what is held back was rewritten too: look again with more
            self._want(len(text) + max(self._windows.hold_back_chars, len(text) // 2))
            return None
        shown, num_out = approved[: len(approved) - len(kept)], len(text) - len(kept)
        if is_rewritten:
            self.ledger.forget_scored()
        if is_whole:
            return self._finish(num_out, shown)
        self._unchecked = self._unchecked[num_out:]
        self._num_seen, self._is_approved = len(kept), True
        seen = self._context + shown
        self._context = seen[max(0, len(seen) - self._windows.context_chars) :]
        self._want(self._window + self._windows.hold_back_chars)
        return None if self._is_optimistic else self._release(num_out, shown)

    def _want(self, num_chars: int) -> None:
        self._wanted = self._least() if self._is_late else num_chars

    def _finish(self, num_chars: int, text: str) -> Delta | None:
        self.is_over = True
        if not self.ledger.has_begun:
            return None
        if self._is_optimistic:
            return self._show(is_last=True)
        return self._release(num_chars, text, is_last=True)

    def _show(self, *, is_last: bool = False) -> Delta:
        shown, self._unshown = self._unshown, ""
        return self._release(len(shown), shown, is_last=is_last)

    def _release(self, num_chars: int, text: str, *, is_last: bool = False) -> Delta:
        oldest_s = self.ledger.oldest_s
        if text and oldest_s is not None and self._observe is not None:
            self._observe(asyncio.get_running_loop().time() - oldest_s)
        return self.ledger.release(num_chars, text, is_last=is_last)
