"""A choice that says a text in pieces, a check of it, and what the guard between them made of both."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import virtual_clock

from cabochon.engine.messages import TokenLogprobs
from cabochon.server.armor.response_guard import Blocked, Windows, guarded
from cabochon.server.generation import Delta
from cabochon.server.logprobs import ScoredTokens

BANNED = "launch code 4471 delta 9"  # as long as the hold-back
HOLD_BACK = len(BANNED)
EMAIL = re.compile(r"[a-z0-9.]+@[a-z0-9.]+")
UNSPLIT = [  # over and over, they have no place to cut: each blank in a cluster, one cluster, one run
    "\u0600 \u0301", "\u0301", "\u0600", "👩\u200d", "🇩", "👩👩\ufe0f\u200d", "क\u094d", "\u0600🇩\u0301", "a",
]  # fmt: skip
WINDOWS = Windows(first_chars=16, max_chars=64, hold_back_chars=HOLD_BACK, context_chars=16)


@dataclass
class World:
    """A choice that says `text` in pieces, and a check that knows one banned phrase and e-mail addresses."""

    text: str
    sizes: Sequence[int] = (5,)  # of pieces, over and over
    delays_s: Sequence[float] = (0.01,)  # before each piece, and of each check
    check_s: Sequence[float] = (0.0,)
    windows: Windows = WINDOWS
    mode: Any = "window"
    banned: str = BANNED
    reads_s: float = 0.0  # what the reader does with each delta takes so long
    late_end_s: float | None = None  # the reason of the end comes so much after the text
    fails_at: int | None = None  # the piece in whose place the source raises
    check_fails_at: int | None = None
    rewrite: Callable[[str], str] = lambda text: EMAIL.sub("[EMAIL]", text)
    scored: bool = False
    behind: Sequence[bool] = (False,)
    # What happened
    shown: list[Delta] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    checks: list[tuple[float, str, str]] = field(default_factory=list)  # time, context, text
    holds_s: list[float] = field(default_factory=list)
    num_generated: int = 0
    is_closed: bool = False
    in_flight: int = 0
    most_in_flight: int = 0
    num_left: int = 0  # tasks, after the end

    async def source(self) -> AsyncGenerator[Delta, None]:
        at = number = 0
        try:
            while at < len(self.text) or number == 0:
                await asyncio.sleep(self.delays_s[number % len(self.delays_s)])
                if number == self.fails_at:
                    raise RuntimeError("engine died")
                end = at + self.sizes[number % len(self.sizes)]
                is_last = end >= len(self.text) and self.late_end_s is None
                self.num_generated += 2
                scored = ScoredTokens([number], [TokenLogprobs(-1.0, [8], [-2.0])]) if self.scored else None
                is_behind = self.behind[number % len(self.behind)]
                yield Delta(3, self.text[at:end], 2, 7, "length" if is_last else None, scored, is_behind)
                at, number = end, number + 1
            if self.late_end_s is not None:
                await asyncio.sleep(self.late_end_s)
                self.num_generated += 2
                yield Delta(3, "", 2, 7, "length")
        finally:
            self.is_closed = True

    async def approve(self, context: str, text: str) -> str:
        number = len(self.checks)
        self.checks.append((self.now(), context, text))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.check_s[number % len(self.check_s)])
        finally:
            self.in_flight -= 1
        if number == self.check_fails_at:
            raise ConnectionError("no answer")
        if self.banned in context + text:
            raise Blocked(("rai:dangerous",))
        return self.rewrite(text)

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def all(self, until: int | None = None) -> None:
        deltas = guarded(
            self.source(), self.approve, mode=self.mode, windows=self.windows, observe=self.holds_s.append
        )
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self.shown.append(delta)
                    self.times_s.append(self.now())
                    if len(self.shown) == until:
                        return
                    if self.reads_s:
                        await asyncio.sleep(self.reads_s)
        finally:
            self.num_left = len(asyncio.all_tasks()) - 1

    def run(self, until: int | None = None) -> "World":
        virtual_clock.run(self.all(until))
        return self

    def said(self) -> str:
        return "".join(delta.text for delta in self.shown)

    def check_books(self) -> None:
        """What holds however it ended."""
        assert self.is_closed or not self.num_generated
        assert self.num_left == 0
        assert self.in_flight == 0
        assert self.most_in_flight <= 1
        assert all(delta.index == 3 for delta in self.shown)
        assert all(delta.finish_reason is None for delta in self.shown[:-1])
        assert min(self.holds_s, default=0.0) >= 0

    def check_end(self, reason: str) -> None:
        self.check_books()
        assert self.shown[-1].finish_reason == reason
        assert sum(delta.num_tokens for delta in self.shown) == self.num_generated
        assert all(delta.cached_tokens == 7 for delta in self.shown)
