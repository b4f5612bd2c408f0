"""Which pages hold which tokens of which request: page tables per layer group, prefix hits, window freeing.

A prefix hit of n pages needs all n in every global group, and in a sliding group those that hold the last
W − 1 tokens before the boundary. Pages that have left a window go back to the pool and stay findable until
reused. Knows nothing of tensors or of which request goes first.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.hashing import PageHasher
from cabochon.engine.kv_events import KVEvents
from cabochon.engine.page_pool import PagePool
from cabochon.engine.request import Request
from cabochon.engine.rows import NULL_PAGE, Rows

NEVER = np.iinfo(np.int32).max  # no step has that many full pages


class KVCache:
    """windows[g]: W of layer group g in tokens, or None. Without a hasher nothing is shared."""

    def __init__(
        self,
        rows: Rows,
        pool: PagePool,
        hasher: PageHasher | None,
        windows: Sequence[int | None],
        events: KVEvents | None = None,
    ) -> None:
        """events: told of pages that can be found; of those that are lost the pool tells it."""
        self.pool = pool
        self.page_tokens = rows.page_tokens
        self._rows = rows
        self._hasher = hasher
        self._windows = tuple(windows)
        self._tables = rows.page_tables
        self._globals = [group for group, window in enumerate(windows) if window is None]
        self._events = events if self._globals else None  # prefixes are what global groups find
        self._sliding = [  # windows and their groups: groups of one window hold the same page indices
            (window, [group for group, other in enumerate(windows) if other == window])
            for window in sorted({window for window in windows if window is not None})
        ]
        # A row holds pages [first, end) of its tables; those before left the window or were never attached
        self._first_page = np.zeros((len(self._sliding), rows.max_seqs), np.int32)
        self._end_page = np.zeros(rows.max_seqs, np.int32)
        self._attached = np.zeros(rows.max_seqs, np.int32)  # pages before it came from the prefix cache
        self._num_named = np.full(rows.max_seqs, NEVER, np.int32)  # pages of a row that can be found

    def page_names(self, request: Request, num_pages: int) -> list[bytes]:
        """Chain hashes of the request's first num_pages full pages; shorter if its known tokens are."""
        if self._hasher is None:
            return []
        self._hash(request, num_pages)
        return request.page_hashes[1 : num_pages + 1]

    def lookup(self, request: Request) -> int:
        """Pages of its prefix that can be shared now: at most all but the last known token."""
        names = self.page_names(request, (self._num_known(request) - 1) // self.page_tokens)
        hit = len(names)
        for group in self._globals:
            missing = (i for i in range(hit) if self.pool.lookup(group, names[i]) is None)
            hit = next(missing, hit)
        while hit and (missing_idx := self._missing_from_tails(names, hit)) is not None:
            hit = missing_idx  # no boundary between it and here can do without it
        return hit

    def admission_cost(self, request: Request, hit_pages: int, chunk_tokens: int) -> int:
        """Free pages it takes until its known tokens are computed: new ones, and cached ones it wakes."""
        names = self.page_names(request, hit_pages)
        num_new = -(-self._num_known(request) // self.page_tokens) - hit_pages
        cost = num_new * len(self._globals)
        for window, groups in self._sliding:
            cost += len(groups) * min(num_new, self._max_pages(window, chunk_tokens))
        for group, any_window in enumerate(self._windows):
            for name in names[hit_pages - self._tail_pages(any_window, hit_pages) :]:
                cost += self.pool.references(self._page(group, name)) == 0
        return cost

    def pages_to_come(self, row: int, chunk_tokens: int) -> int:
        """Free pages that a running prefill will still take for its known tokens."""
        end, attached = int(self._end_page[row]), int(self._attached[row])
        num_new = -(-int(self._rows.num_tokens[row]) // self.page_tokens) - end
        total = num_new * len(self._globals)
        for idx, (window, groups) in enumerate(self._sliding):
            # What it holds comes back as the window moves, but for attached pages: others may hold them too
            own = end - max(attached, int(self._first_page[idx, row]))
            total += len(groups) * min(num_new, max(0, self._max_pages(window, chunk_tokens) - own))
        return total

    def attach(self, request: Request, row: int, hit_pages: int) -> None:
        """Share the first hit_pages pages with a fresh row."""
        names = self.page_names(request, hit_pages)
        for group, window in enumerate(self._windows):
            first = hit_pages - self._tail_pages(window, hit_pages)
            pages = [self._page(group, name) for name in names[first:]]
            for page in pages:
                self.pool.share(page)
            self._tables[group, row, first:hit_pages] = pages
        for idx, (window, _) in enumerate(self._sliding):
            self._first_page[idx, row] = hit_pages - self._tail_pages(window, hit_pages)
        self._end_page[row] = self._attached[row] = hit_pages
        self._rows.num_computed[row] = hit_pages * self.page_tokens
        is_shared = request.is_published and self._hasher is not None
        self._num_named[row] = hit_pages if is_shared else NEVER

    def extend(self, row: int, num_new: int) -> bool:
        """Pages for the next num_new tokens in every group; nothing taken and False if there are too few."""
        start = int(self._end_page[row])
        end = -(-(int(self._rows.num_computed[row]) + num_new) // self.page_tokens)
        if end <= start:
            return True  # a smaller chunk of the same step may have taken them
        shape = (end - start, len(self._windows))
        if shape[0] * shape[1] > self.pool.num_free:
            return False
        pages = self.pool.allocate(shape[0] * shape[1])
        self._tables[:, row, start:end] = np.array(pages, np.int32).reshape(shape).T
        self._end_page[row] = end
        return True

    def extend_each(self, rows: NDArray[np.intp]) -> bool:
        """Pages for the next token of each of these rows; nothing taken and False if there are too few."""
        ends = self._end_page[rows]
        # Not those of a step that did not count: it took them already
        lacking = ends * self.page_tokens <= self._rows.num_computed[rows]
        if np.count_nonzero(lacking) < len(rows):
            rows, ends = rows[lacking], ends[lacking]
        shape = (len(rows), len(self._windows))
        if shape[0] * shape[1] > self.pool.num_free:
            return False
        pages = self.pool.allocate(shape[0] * shape[1])
        self._tables[:, rows, ends] = np.array(pages, np.int32).reshape(shape).T
        self._end_page[rows] = ends + 1
        return True

    def commit(self, by_row: Mapping[int, Request], rows: NDArray[np.intp]) -> None:
        """Name the pages that are full of known tokens, give back those that no later query sees.

        Of rows [n]. Once the step is on its way: what else gets these pages runs after it.
        """
        P, computed = self.page_tokens, self._rows.num_computed[rows]
        known = self._rows.num_tokens[rows] - self._rows.num_pending[rows]
        full = np.minimum(computed, known) // P
        is_behind = full > self._num_named[rows]
        if np.count_nonzero(is_behind):
            for row, num_pages in zip(rows[is_behind].tolist(), full[is_behind].tolist(), strict=True):
                self._register(by_row[row], row, num_pages)
        for idx, (window, groups) in enumerate(self._sliding):
            # Page p goes when its last position (p + 1) P − 1 is at most q − W, q = computed the next query
            firsts, ends = self._first_page[idx, rows], (computed - window + 1) // P
            has_left = ends > firsts
            if not np.count_nonzero(has_left):
                continue
            left = (rows[has_left].tolist(), firsts[has_left].tolist(), ends[has_left].tolist())
            for row, first, end in zip(*left, strict=True):
                self._release(self._tables[groups, row, first:end].T)
                self._tables[groups, row, first:end] = NULL_PAGE
                self._first_page[idx, row] = end

    def num_named(self, row: int) -> int:
        """Its first so many pages can be found; NEVER if none that it computes ever can."""
        return int(self._num_named[row])

    def publish(self, request: Request) -> None:
        """Offer the pages of a private request to others from now on."""
        request.is_published = True
        row = request.row
        if row is not None and self._hasher is not None:
            self._num_named[row] = self._attached[row]
            computed = min(int(self._rows.num_computed[row]), len(self._known_tokens(request)))
            self._register(request, row, computed // self.page_tokens)

    def disown(self, request: Request) -> None:
        """Nobody finds the pages that it has computed, from now on. The request must have a row."""
        assert request.row is not None
        request.is_published = False
        self._num_named[request.row] = NEVER
        for page in self._tables[:, request.row, self._attached[request.row] :].ravel().tolist():
            if page != NULL_PAGE:
                self.pool.forget(page)

    def free(self, row: int) -> None:
        """Give back everything, the tail of the chain first, so that it is reused before its head."""
        end = int(self._end_page[row])
        self._release(self._tables[:, row, :end].T[::-1])
        self._tables[:, row, :end] = NULL_PAGE
        self._first_page[:, row] = self._end_page[row] = self._attached[row] = 0
        self._num_named[row] = NEVER

    def check(self, running: dict[int, Request]) -> None:
        """Prove that tables and reference counts agree, and that no page that is written has two owners."""
        self.pool.check()
        owners: dict[int, int] = {}
        for row in range(self._rows.max_seqs):
            pages = self._tables[:, row][self._tables[:, row] != NULL_PAGE].tolist()
            assert row in running or not pages, "a free row holds pages"
            for page in pages:
                owners[page] = owners.get(page, 0) + 1
        assert all(self.pool.references(page) == count for page, count in owners.items()), "wrong references"
        assert len(owners) == self.pool.num_used, "a page is used by nobody"
        for row in range(self._rows.max_seqs):
            end = int(self._end_page[row])
            assert not self._tables[:, row, end:].any(), "pages beyond the end of a row"
            assert self._tables[self._globals, row, :end].all(), "a global group lost a page"
            for idx, (_, groups) in enumerate(self._sliding):
                first = int(self._first_page[idx, row])
                assert not self._tables[groups, row, :first].any(), "a page outlived its window"
                assert self._tables[groups, row, first:end].all(), "a window lost a page"
        for row in running:
            open_page = int(self._rows.num_computed[row]) // self.page_tokens
            for page in self._tables[:, row, open_page:].ravel():
                assert page == NULL_PAGE or owners[int(page)] == 1, "a page that is written has two owners"
                assert page == NULL_PAGE or not self.pool.is_named(int(page)), (
                    "a page that is written is findable"
                )

    def _hash(self, request: Request, num_pages: int) -> None:
        """Make request.page_hashes, which begin with the root, as long as its known tokens allow."""
        assert self._hasher is not None
        names = request.page_hashes
        if not names:
            adapter = None if request.adapter is None else request.adapter.key
            names.append(self._hasher.root(adapter, request.message.cache_salt))
        known = len(names) - 1
        if known < num_pages:
            tokens, P = self._known_tokens(request), self.page_tokens  # [num_tokens]
            end = min(num_pages, len(tokens) // P)
            names += self._hasher.chain(names[-1], tokens[known * P : end * P], P)

    def _num_known(self, request: Request) -> int:
        return len(request.token_ids) if request.row is None else int(self._rows.num_tokens[request.row])

    def _known_tokens(self, request: Request) -> NDArray[np.int32]:
        if request.row is None:
            return request.token_ids
        return self._rows.known(request.row)

    def _tail_pages(self, window: int | None, hit_pages: int) -> int:
        """How many of the pages before a boundary the query behind it sees."""
        return hit_pages if window is None else min(hit_pages, -(-(window - 1) // self.page_tokens))

    def _missing_from_tails(self, names: list[bytes], hit_pages: int) -> int | None:
        """A page that a window at the boundary still sees, and that its group lacks."""
        for window, groups in self._sliding:
            first = hit_pages - self._tail_pages(window, hit_pages)
            for page_idx in range(hit_pages - 1, first - 1, -1):
                if any(self.pool.lookup(group, names[page_idx]) is None for group in groups):
                    return page_idx
        return None

    def _max_pages(self, window: int, chunk_tokens: int) -> int:
        """What a sequence holds of a sliding group: the window, a chunk behind it, one for misalignment."""
        return -(-(window - 1 + chunk_tokens) // self.page_tokens) + 1

    def _page(self, group: int, name: bytes) -> int:
        page = self.pool.lookup(group, name)
        assert page is not None, "the hit is gone"
        return page

    def _register(self, request: Request, row: int, num_pages: int) -> None:
        start = self.num_named(row)
        self._hash(request, num_pages)
        names = request.page_hashes[start + 1 : num_pages + 1]
        for group, pages in enumerate(self._tables[:, row, start:num_pages].tolist()):
            self.pool.register(pages, group, names)
        self._num_named[row] = num_pages
        if self._events is not None:
            self._announce(request, start, num_pages)

    def _announce(self, request: Request, start: int, end: int) -> None:
        """Tell of the pages [start, end).

        Not with a salt: who hashes token ids alone would send requests that cannot hit, and no tenant's salt
        may leave the process. Not of an adapter that new requests cannot name.
        """
        assert self._events is not None
        adapter = request.adapter
        if request.message.cache_salt is not None or (adapter is not None and adapter.is_unloaded):
            return
        tokens, P, names = self._known_tokens(request), self.page_tokens, request.page_hashes
        for page_idx in range(start, end):
            parent = names[page_idx] if page_idx else None  # names[0] is the root
            page = tokens[page_idx * P : (page_idx + 1) * P].tobytes()
            self._events.store(names[page_idx + 1], parent, page, adapter)

    def _release(self, pages: NDArray[np.int32]) -> None:
        """pages: [num_pages, num_groups], given back in that order; null pages are skipped."""
        for page in pages.ravel().tolist():
            if page != NULL_PAGE:
                self.pool.release(page)
