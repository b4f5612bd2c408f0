"""Pages that a running request is about to fill: who has the same prefix waits for them and shares."""

from itertools import repeat

from cabochon.engine.kv_cache import KVCache
from cabochon.engine.request import Request


class AwaitedPages:
    """By name, chain hashes as in KVCache.page_names."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._by_name: dict[bytes, Request] = {}

    def hit(self, request: Request) -> int | None:
        """Pages of its prefix that it can share now; None if it should wait for more."""
        if request.message.params.prompt_logprobs is not None:
            return 0  # they need the prompt's hidden rows, which no cache holds
        hit, names = self._cache.lookup(request), self._names(request)
        return None if hit < len(names) and self._is_coming(names[hit], hit, request) else hit

    def expect(self, request: Request, hit_pages: int) -> None:
        """The request will fill the pages behind its hit; if it is published, it offers them."""
        if request.is_published:
            self._by_name.update(zip(self._names(request)[hit_pages:], repeat(request)))

    def forget(self, request: Request) -> None:
        """Nothing comes from it any more."""
        for name in request.page_hashes[1:]:  # the first is the root
            if self._by_name.get(name) is request:
                del self._by_name[name]

    def check(self) -> None:
        """Prove that nobody waits in vain."""
        assert all(r.row is not None for r in self._by_name.values()), "pages are awaited from nobody"

    def _names(self, request: Request) -> list[bytes]:
        return self._cache.page_names(request, len(request.token_ids) // self._cache.page_tokens)

    def _is_coming(self, name: bytes, page_idx: int, request: Request) -> bool:
        """Whether a better-ranked request fills that page soon. Worse-ranked ones may have to wait."""
        other = self._by_name.get(name)
        if other is None or other.row is None or other.rank > request.rank:
            return False
        return self._cache.num_named(other.row) <= page_idx
