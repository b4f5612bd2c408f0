"""Who owns a page: reference counts, an LRU list of free pages, and what content the free ones still hold.

A page is used (referenced), cached (free, but its content has a name and may be shared again) or free. Arrays
and an intrusive doubly linked list, no objects per page: removal from the middle is O(1) (vLLM's
v1/core/block_pool.py). Knows nothing of tensors, sequences or windows.
"""

from collections.abc import Callable, Sequence

NIL = 0  # page 0 is the null page, never in the list: it serves as the list's sentinel


class PagePool:
    """Pages 1..num_pages. The head of the free list is reused first, the tail last."""

    def __init__(self, num_pages: int, on_lost: Callable[[int, bytes], None] | None = None) -> None:
        """on_lost: told the group and the content of a page that can be found no more."""
        self.num_pages = num_pages
        self._on_lost = on_lost
        self.num_cached = 0
        self.num_free = num_pages  # cached ones included: they can be had at once
        self._references = [0] * (num_pages + 1)
        self._next: list[int] = [*range(1, num_pages + 1), NIL]  # a ring through the sentinel
        self._previous: list[int] = [num_pages, *range(num_pages)]
        self._name: list[tuple[int, bytes] | None] = [None] * (num_pages + 1)
        self._page_of: dict[tuple[int, bytes], int] = {}

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def references(self, page: int) -> int:
        """How many page table entries hold the page."""
        return self._references[page]

    def is_named(self, page: int) -> bool:
        """Whether its content can be found and shared."""
        return self._name[page] is not None

    def allocate(self, count: int) -> list[int]:
        """The least recently used free pages, their old content forgotten. There must be as many."""
        assert count <= self.num_free, "no free page"
        pages, page = [], self._next[NIL]
        for _ in range(count):
            pages.append(page)
            self.num_cached -= self._name[page] is not None
            self._lose_name(page)
            self._references[page] = 1
            page = self._next[page]
        self._next[NIL], self._previous[page] = page, NIL
        self.num_free -= count
        return pages

    def share(self, page: int) -> None:
        """One more owner for a page that `lookup` gave."""
        assert self._name[page] is not None, (
            "only named pages are shared: they are full and never written again"
        )
        if self._references[page] == 0:
            self._unlink(page)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One owner less. A named page without owners stays findable until it is reused."""
        assert self._references[page] > 0, "released more often than owned"
        self._references[page] -= 1
        if self._references[page] == 0:
            self._link(page, is_first=self._name[page] is None)

    def register(self, pages: Sequence[int], group: int, contents: Sequence[bytes]) -> None:
        """Name the contents of full pages; null pages are skipped.

        If another page has a name already, nothing changes for that one.
        """
        names, page_of = self._name, self._page_of
        for page, content in zip(pages, contents, strict=True):
            if page == NIL:
                continue
            assert self._references[page] > 0, "only pages in use are named"
            name = (group, content)
            if names[page] is None and name not in page_of:
                names[page] = name
                page_of[name] = page

    def forget(self, page: int) -> None:
        """Take the name of a page in use, if it has one."""
        assert self._references[page] > 0, "only pages in use are forgotten"
        self._lose_name(page)

    def lookup(self, group: int, content: bytes) -> int | None:
        """The page with that content, used or cached."""
        return self._page_of.get((group, content))

    def check(self) -> None:
        """Prove that every page is in exactly one state and the books agree."""
        listed, page, before = [], self._next[NIL], NIL
        while page != NIL:
            assert self._previous[page] == before, "broken list"
            listed.append(page)
            before, page = page, self._next[page]
        assert self._previous[NIL] == before, "broken list"
        assert len(set(listed)) == len(listed) == self.num_free, "free pages are not the list"
        assert all(count >= 0 for count in self._references), "negative references"
        used = [page for page in range(1, self.num_pages + 1) if self._references[page]]
        assert sorted([*used, *listed]) == list(range(1, self.num_pages + 1)), "free + used is not all"
        assert self.num_cached == sum(self._name[page] is not None for page in listed), "wrong num_cached"
        names = {name: page for page, name in enumerate(self._name) if name is not None}
        assert names == self._page_of, "names and pages disagree"

    def _lose_name(self, page: int) -> None:
        name = self._name[page]
        if name is not None:
            self._name[page] = None
            del self._page_of[name]
            if self._on_lost is not None:
                self._on_lost(*name)

    def _unlink(self, page: int) -> None:
        before, after = self._previous[page], self._next[page]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1
        self.num_cached -= self._name[page] is not None

    def _link(self, page: int, *, is_first: bool) -> None:
        before = NIL if is_first else self._previous[NIL]
        after = self._next[before]
        self._next[before] = self._previous[after] = page
        self._previous[page], self._next[page] = before, after
        self.num_free += 1
        self.num_cached += self._name[page] is not None
