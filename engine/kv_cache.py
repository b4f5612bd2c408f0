"""Which pages hold which tokens of which request: page tables per layer group, prefix hits, window freeing.

A prefix hit of n pages needs all n in every global group, and in a sliding group those that hold the last W − 1
tokens before the boundary. Pages that have left a window go back to the pool and stay findable until reused.
Knows nothing of tensors or of which request goes first.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.hashing import PageHasher
from cabochon.engine.page_pool import PagePool
from cabochon.engine.request import Request
from cabochon.engine.rows import NULL_PAGE, Rows


class KVCache:
    """windows[g]: W of layer group g in tokens, or None. Without a hasher nothing is shared."""

    def __init__(
        self, rows: Rows, pool: PagePool, hasher: PageHasher | None, windows: Sequence[int | None]
    ) -> None:
        self.pool = pool
        self.page_tokens = rows.page_tokens
        self._rows = rows
        self._hasher = hasher
        self._windows = tuple(windows)
        self._tables = rows.page_tables
        # [num_groups, max_seqs]: pages before it have left the window (or were never attached)
        self._first_page = np.zeros((len(windows), rows.max_seqs), np.int32)

    def page_names(self, request: Request, num_pages: int) -> list[bytes]:
        """Chain hashes of the request's first num_pages full pages; shorter if its known tokens are."""
        if self._hasher is None:
            return []
        names = request.page_hashes
        if not names:
            message = request.message
            names.append(self._hasher.root(message.adapter, message.cache_salt))
        known = len(names) - 1  # names[0] is the root
        if known < num_pages:
            tokens = self._known_tokens(request)
            for page_idx in range(known, min(num_pages, len(tokens) // self.page_tokens)):
                start = page_idx * self.page_tokens
                names.append(self._hasher.extend(names[-1], tokens[start : start + self.page_tokens]))
        return names[1 : num_pages + 1]

    def lookup(self, request: Request) -> int:
        """Pages of its prefix that can be shared now: at most all but the last known token."""
        limit = (len(self._known_tokens(request)) - 1) // self.page_tokens
        runs = [0] * len(self._windows)  # per group: cached pages in a row, ending here
        hit = 0
        for page_idx, name in enumerate(self.page_names(request, limit)):
            for group in range(len(runs)):
                runs[group] = runs[group] + 1 if self.pool.lookup(group, name) is not None else 0
            wanted = [self._tail_pages(group, page_idx + 1) for group in range(len(runs))]
            if all(run >= want for run, want in zip(runs, wanted, strict=True)):
                hit = page_idx + 1
            elif any(window is None and not run for window, run in zip(self._windows, runs, strict=True)):
                break  # a global group misses a page: no longer prefix can be whole
        return hit

    def admission_cost(self, request: Request, hit_pages: int, chunk_tokens: int) -> int:
        """Free pages it takes until its known tokens are computed: new ones, and cached ones it wakes."""
        total = -(-len(self._known_tokens(request)) // self.page_tokens)
        cost = 0
        for group, window in enumerate(self._windows):
            tail = self._tail_pages(group, hit_pages)
            for name in self.page_names(request, hit_pages)[hit_pages - tail :]:
                page = self.pool.lookup(group, name)
                assert page is not None
                cost += self.pool.references(page) == 0
            new = total - hit_pages
            if window is not None:
                new = min(new, -(-(window - 1 + chunk_tokens) // self.page_tokens) + 1)
            cost += new
        return cost

    def attach(self, request: Request, row: int, hit_pages: int) -> None:
        """Share the first hit_pages pages with a fresh row."""
        names = self.page_names(request, hit_pages)
        for group in range(len(self._windows)):
            first = hit_pages - self._tail_pages(group, hit_pages)
            self._first_page[group, row] = first
            for page_idx in range(first, hit_pages):
                page = self.pool.lookup(group, names[page_idx])
                assert page is not None, "the hit is gone"
                self.pool.share(page)
                self._tables[group, row, page_idx] = page
        self._rows.num_computed[row] = hit_pages * self.page_tokens
        request.num_registered = hit_pages

    def extend(self, row: int, num_new: int) -> bool:
        """Pages for the next num_new tokens in every group; False, and nothing taken, if the pool has too few."""
        computed = int(self._rows.num_computed[row])
        start, end = -(-computed // self.page_tokens), -(-(computed + num_new) // self.page_tokens)
        while start < end and self._tables[0, row, start] != NULL_PAGE:
            start += 1  # taken a moment ago, for a smaller chunk of the same step
        if (end - start) * len(self._windows) > self.pool.num_free:
            return False
        for page_idx in range(start, end):
            for group in range(len(self._windows)):
                self._tables[group, row, page_idx] = self.pool.allocate()
        return True

    def commit(self, request: Request, row: int) -> None:
        """After a step: name the pages that are full, give back those that no later query sees."""
        computed = int(self._rows.num_computed[row])
        if request.is_published:
            self._register(request, row, computed // self.page_tokens)
        for group, window in enumerate(self._windows):
            if window is None:
                continue
            # Page p goes when its last position (p + 1) P − 1 is at most q − W, q = computed the next query
            end = max(0, computed - window + 1) // self.page_tokens
            for page_idx in range(int(self._first_page[group, row]), end):
                self._drop(group, row, page_idx)
            self._first_page[group, row] = max(end, self._first_page[group, row])

    def publish(self, request: Request) -> None:
        """Offer the pages of a private request to others from now on."""
        request.is_published = True
        if request.row is not None:
            computed = int(self._rows.num_computed[request.row])
            self._register(request, request.row, computed // self.page_tokens)

    def free(self, row: int) -> None:
        """Give back everything, the tail of the chain first, so that it is reused before its head."""
        held = -(-int(self._rows.num_tokens[row]) // self.page_tokens)
        for page_idx in range(held - 1, -1, -1):
            for group in range(len(self._windows)):
                self._drop(group, row, page_idx)
        self._first_page[:, row] = 0

    def needs_commit(self, before: NDArray[np.int32], after: NDArray[np.int32]) -> NDArray[np.bool_]:
        """For values of num_computed before and after a step: is there anything to name or to give back?"""
        P = self.page_tokens
        changed = before // P != after // P
        for window in {window for window in self._windows if window is not None}:
            changed |= (before - window + 1) // P != (after - window + 1) // P
        return changed

    def pages_to_come(self, request: Request, chunk_tokens: int) -> int:
        """Free pages that a running prefill will still take for its known tokens."""
        assert request.row is not None
        held = -(-int(self._rows.num_computed[request.row]) // self.page_tokens)
        new = -(-int(self._rows.num_tokens[request.row]) // self.page_tokens) - held
        return sum(
            new if window is None else min(new, -(-(window - 1 + chunk_tokens) // self.page_tokens) + 1)
            for window in self._windows
        )

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
        for row in running:
            open_page = int(self._rows.num_computed[row]) // self.page_tokens
            for page in self._tables[:, row, open_page:].ravel():
                assert page == NULL_PAGE or owners[int(page)] == 1, "a page that is written has two owners"

    def _known_tokens(self, request: Request) -> np.ndarray:
        if request.row is None:
            return np.asarray(request.token_ids, np.int32)
        return self._rows.token_ids[request.row, : self._rows.num_tokens[request.row]]

    def _tail_pages(self, group: int, hit_pages: int) -> int:
        window = self._windows[group]
        return hit_pages if window is None else min(hit_pages, -(-(window - 1) // self.page_tokens))

    def _register(self, request: Request, row: int, num_pages: int) -> None:
        names = self.page_names(request, num_pages)
        for page_idx in range(request.num_registered, len(names)):
            for group in range(len(self._windows)):
                page = int(self._tables[group, row, page_idx])
                if page != NULL_PAGE:
                    self.pool.register(page, group, names[page_idx])
        request.num_registered = max(request.num_registered, len(names))

    def _drop(self, group: int, row: int, page_idx: int) -> None:
        page = int(self._tables[group, row, page_idx])
        if page != NULL_PAGE:
            self._tables[group, row, page_idx] = NULL_PAGE
            self.pool.release(page)
