"""Who may still come in: admission by predicted wait, lame duck, drain, dead engine."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from cabochon.engine.engine import Engine
from cabochon.engine.errors import EngineDead, Overloaded
from cabochon.server.config import ServerConfig


class Phase(Enum):
    """Where the server is between start and end."""

    SERVING = "serving"
    LAME_DUCK = "lame duck"  # health says 503, so that load balancers leave; requests are still served
    DRAINING = "draining"  # new requests get 503, running ones finish
    ENDED = "ended"  # what is left ends with an error


class Lifecycle:
    """Counts open requests; refuses new ones when it must."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self._engine = engine
        self._config = config
        self.phase = Phase.SERVING
        self.problem: Callable[[], str | None] = lambda: None  # what keeps the server from being ready
        self.num_open = 0
        self._unstarted_tokens = 0  # prompt tokens of open requests without a first token
        self._idle = asyncio.Event()
        self._idle.set()
        self.ended = asyncio.Event()

    def health(self) -> tuple[int, str]:
        """Status code and word for probes: 200 only if new requests should be sent here."""
        if self._engine.dead_reason() is not None:
            return 503, "engine dead"
        if problem := self.problem():
            return 503, problem
        return (200, "ok") if self.phase is Phase.SERVING else (503, self.phase.value)

    def check_open(self) -> None:
        """Raises EngineDead if nothing must start any more."""
        if reason := self._engine.dead_reason():
            raise EngineDead(reason)
        if self.phase in (Phase.DRAINING, Phase.ENDED):
            raise EngineDead("the server must not be shutting down, it is: send the request to another")

    def queued_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        # The last snapshot does not know of those that came since; a step may take long
        return max(self._engine.stats().queued_tokens, self._unstarted_tokens)

    def predicted_wait_s(self) -> float:
        """Queued tokens over the measured rate; 0 before the first measurement."""
        rate = self._engine.stats().prefill_tokens_per_s
        return self.queued_tokens() / rate if rate else 0.0

    def admit(self, num_requests: int) -> None:
        """Raises Overloaded or EngineDead if the requests must not start now."""
        self.check_open()
        wait_s = self.predicted_wait_s()
        if wait_s > self._config.max_queue_wait_s:
            raise Overloaded(
                f"the predicted wait must be at most {self._config.max_queue_wait_s:g} s,"
                f" it is {wait_s:.0f} s: retry later",
                wait_s,
            )
        if self.num_open + num_requests > self._config.max_queued_requests:
            raise Overloaded(
                f"at most {self._config.max_queued_requests} requests may be open,"
                f" {self.num_open} are: retry later",
                max(wait_s, 1.0),
            )

    @contextmanager
    def opened(self, num_requests: int, prompt_tokens: int) -> Iterator[Callable[[], None]]:
        """Count requests as open while the context lasts. Call what it gives at the first token."""
        waiting = prompt_tokens
        self.num_open += num_requests
        self._unstarted_tokens += prompt_tokens
        self._idle.clear()

        def started() -> None:
            nonlocal waiting
            self._unstarted_tokens -= waiting
            waiting = 0

        try:
            yield started
        finally:
            started()
            self.num_open -= num_requests
            if self.num_open == 0:
                self._idle.set()

    async def drain(self) -> bool:
        """Lame duck, then drain, then end what is left. Returns whether every request finished by itself."""
        self.phase = Phase.LAME_DUCK
        await asyncio.sleep(self._config.lame_duck_s)
        self.phase = Phase.DRAINING
        deadline = time.monotonic() + self._config.drain_timeout_s
        while self.num_open and time.monotonic() < deadline and self._engine.dead_reason() is None:
            try:
                await asyncio.wait_for(self._idle.wait(), min(0.2, max(0.01, deadline - time.monotonic())))
            except TimeoutError:
                continue
        is_clean = self.num_open == 0
        self.phase = Phase.ENDED
        self.ended.set()
        return is_clean
