"""Verdicts on prompts' texts, for a while: chats send their earlier turns again and again.

A key is an HMAC under a key of this process: memory holds neither texts nor hashes that one could look up.
Only a rewrite is kept with its own, de-identified text. What could not be checked is not kept.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from cabochon.server.armor.verdicts import Verdict

MAX_ENTRIES = 10_000  # a few hundred bytes each, but for rewrites


@dataclass(slots=True)
class _Asking:
    """A call under way, and how many wait for it."""

    task: asyncio.Task[Verdict]
    num_waiting: int = 0


class VerdictCache:
    """The last `max_entries` used, each for `keep_s`. Who asks the same at the same time shares a call."""

    def __init__(
        self, keep_s: float, max_entries: int = MAX_ENTRIES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """keep_s: 0 keeps nothing, and calls are still shared."""
        self._keep_s = keep_s
        self._max_entries = max_entries
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, tuple[float, Verdict]] = OrderedDict()  # until when; last used last
        self._asking: dict[bytes, _Asking] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, *parts: str | Sequence[str]) -> bytes:
        """Of all that the verdict depends on. Lone surrogates are allowed."""
        mac = hmac.new(self._secret, digestmod=hashlib.sha256)
        for part in parts:
            for word in [part] if isinstance(part, str) else [str(len(part)), *part]:
                data = word.encode("utf-8", "surrogatepass")
                mac.update(len(data).to_bytes(8, "little") + data)  # lengths: other parts, other bytes
        return mac.digest()

    def find(self, key: bytes) -> Verdict | None:
        """What was kept, if it still holds."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        if self._clock() >= kept[0]:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return kept[1]

    def keep(self, key: bytes, verdict: Verdict) -> None:
        """From now on, unless nobody could tell."""
        if verdict.outcome == "unchecked" or self._keep_s == 0:
            return
        self._kept[key] = (self._clock() + self._keep_s, verdict)
        self._kept.move_to_end(key)
        while len(self._kept) > self._max_entries:
            self._kept.popitem(last=False)

    async def find_or_ask(self, key: bytes, ask: Callable[[], Awaitable[Verdict]]) -> Verdict:
        """What was kept, or what `ask` says, run once for all who wait; with the last of them it ends."""
        if (kept := self.find(key)) is not None:
            return kept
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = _Asking(asyncio.ensure_future(self._ask(key, ask)))
        asking.num_waiting += 1
        try:
            return await asyncio.shield(asking.task)
        finally:
            asking.num_waiting -= 1
            if asking.num_waiting == 0:
                asking.task.cancel()  # of one that has ended this does nothing
                if self._asking.get(key) is asking:
                    del self._asking[key]

    async def _ask(self, key: bytes, ask: Callable[[], Awaitable[Verdict]]) -> Verdict:
        verdict = await ask()
        self.keep(key, verdict)
        return verdict
