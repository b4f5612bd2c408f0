"""Who owns a page: reference counts, free pages in order of reuse, and what content they still hold.

A page is used (referenced), cached (free, but its content has a name and may be shared again) or blank. Blank
ones are reused first, the last released before others: it is warm. Then cached ones, the least recently used
before others. Knows nothing of tensors, sequences or windows.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

NIL = 0  # the null page is never handed out
NOTHING: dict[bytes, int] = {}


class PagePool:
    """Pages 1..num_pages."""

    def __init__(self, num_pages: int, on_lost: Callable[[int, bytes], None] | None = None) -> None:
        """on_lost: told the group and the content of a page that can be found no more."""
        self.num_pages = num_pages
        self._on_lost = on_lost
        self._references = [0] * (num_pages + 1)
        self._blank = list(range(num_pages, 0, -1))  # a stack
        # The oldest first. No dict: after many deletions its first takes a search
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._content: list[bytes | None] = [None] * (num_pages + 1)  # with its group: the page's name
        self._group = [0] * (num_pages + 1)
        self._page_of: dict[int, dict[bytes, int]] = {}  # by group and content

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Cached ones included: they can be had at once."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def references(self, page: int) -> int:
        """How many page table entries hold the page."""
        return self._references[page]

    def is_named(self, page: int) -> bool:
        """Whether its content can be found and shared."""
        return self._content[page] is not None

    def allocate(self, count: int) -> list[int]:
        """The first free pages in order of reuse, their old content forgotten. There must be as many."""
        assert count <= self.num_free, "no free page"
        end = max(0, len(self._blank) - count)
        pages = self._blank[end:][::-1]
        del self._blank[end:]
        if len(pages) < count:  # as ever once a server has run for a while
            oldest = [*islice(self._cached, count - len(pages))]
            for page in oldest:
                del self._cached[page]
                self._lose_name(page)
            pages += oldest
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One more owner for a page that `lookup` gave."""
        assert self._content[page] is not None, (
            "only named pages are shared: they are full and never written again"
        )
        if self._references[page] == 0:
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One owner less. A named page without owners stays findable until it is reused."""
        assert self._references[page] > 0, "released more often than owned"
        self._references[page] -= 1
        if self._references[page] > 0:
            return
        if self._content[page] is None:
            self._blank.append(page)
        else:
            self._cached[page] = None

    def register(self, pages: Sequence[int], group: int, contents: Sequence[bytes]) -> None:
        """Name the contents of full pages; null pages are skipped.

        If another page has a name already, nothing changes for that one.
        """
        content_of, page_of = self._content, self._page_of.setdefault(group, {})
        for page, content in zip(pages, contents, strict=True):
            if page == NIL or content_of[page] is not None:
                continue
            assert self._references[page] > 0, "only pages in use are named"
            if page_of.setdefault(content, page) == page:
                content_of[page], self._group[page] = content, group

    def forget(self, page: int) -> None:
        """Take the name of a page in use, if it has one."""
        assert self._references[page] > 0, "only pages in use are forgotten"
        self._lose_name(page)

    def lookup(self, group: int, content: bytes) -> int | None:
        """The page with that content, used or cached."""
        return self._page_of.get(group, NOTHING).get(content)

    def check(self) -> None:
        """Prove that every page is in exactly one state and the books agree."""
        assert all(count >= 0 for count in self._references), "negative references"
        used = [page for page in range(1, self.num_pages + 1) if self._references[page]]
        states = sorted([*used, *self._blank, *self._cached])
        assert states == list(range(1, self.num_pages + 1)), "used + blank + cached is not all"
        assert all(self._content[page] is None for page in self._blank), "a blank page has a name"
        assert all(self._content[page] is not None for page in self._cached), "a cached page has no name"
        names = {
            (self._group[page], content): page
            for page, content in enumerate(self._content)
            if content is not None
        }
        found = {
            (g, content): page for g, of_group in self._page_of.items() for content, page in of_group.items()
        }
        assert names == found, "names and pages disagree"

    def _lose_name(self, page: int) -> None:
        content = self._content[page]
        if content is not None:
            self._content[page], group = None, self._group[page]
            del self._page_of[group][content]
            if self._on_lost is not None:
                self._on_lost(group, content)
