"""Pages that a running request is about to fill: who has the same prefix waits for them and shares.

Of a prefix that two have, the second lacks first what the other computes next, as a rule. So one page of each
is enough.
"""

from collections.abc import Iterable

from cabochon.engine.kv_cache import KVCache
from cabochon.engine.request import Request


class AwaitedPages:
    """Of the step that is being planned."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._next: dict[bytes, Request] = {}  # who computes the page of that name, a chain hash

    def begin(self, prefills: Iterable[Request]) -> None:
        """They compute something, or will."""
        self._next.clear()
        for request in prefills:
            self.expect(request)

    def expect(self, request: Request) -> None:
        """It has got its row, and offers what it computes unless it is private."""
        assert request.row is not None
        first = self._cache.num_named(request.row)
        if request.message.params.prompt_logprobs is not None:
            first = max(first, self._cache.lookup(request))  # it computes pages, too, that others find
        index = first + 1  # behind the root
        if index >= len(request.page_hashes):
            return
        name = request.page_hashes[index]
        other = self._coming(name)
        if other is None or request.rank < other.rank:
            self._next[name] = request

    def hit(self, request: Request) -> int | None:
        """Pages of its prefix that it can share now; None if it should wait for more."""
        if request.message.params.prompt_logprobs is not None:
            return 0  # they need the prompt's hidden rows, which no cache holds
        hit = self._cache.lookup(request)
        names = self._cache.page_names(request, len(request.token_ids) // self._cache.page_tokens)
        other = self._coming(names[hit]) if hit < len(names) else None
        # Worse-ranked ones may have to wait themselves
        return hit if other is None or other.rank > request.rank else None

    def _coming(self, name: bytes) -> Request | None:
        other = self._next.get(name)
        return None if other is None or other.row is None else other  # it was preempted since
