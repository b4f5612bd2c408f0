"""Pages that a running request is about to fill: who has the same prefix waits for them and shares."""

from collections.abc import Iterable

from cabochon.engine.request import Request


class AwaitedPages:
    """By name, chain hashes as in KVCache.page_names."""

    def __init__(self) -> None:
        self._by_name: dict[bytes, Request] = {}

    def expect(self, names: Iterable[bytes], request: Request) -> None:
        """The request will fill these pages and offer them."""
        self._by_name.update(dict.fromkeys(names, request))

    def is_coming(self, name: bytes, page_idx: int, request: Request) -> bool:
        """Whether a better-ranked request fills that page soon. Worse-ranked ones may have to wait."""
        other = self._by_name.get(name)
        if other is None or other.row is None or other.rank > request.rank:
            return False
        return other.num_registered <= page_idx

    def forget(self, request: Request) -> None:
        """Nothing comes from it any more."""
        for name in request.page_hashes[1:]:  # the first is the root
            if self._by_name.get(name) is request:
                del self._by_name[name]

    def check(self) -> None:
        """Prove that nobody waits in vain."""
        assert all(r.row is not None for r in self._by_name.values()), "pages are awaited from nobody"
