"""Page tables, prefix hits and window freeing: typed by hand, and beside brute force over positions."""

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cabochon.engine.hashing import PageHasher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.page_pool import PagePool
from cabochon.engine.request import Request
from cabochon.engine.rows import NULL_PAGE, Rows
from cabochon.engine.sampling_params import SamplingParams

MAX_LEN = 64


def cache_of(
    windows: Sequence[int | None], *, page_tokens: int = 4, num_pages: int = 200, max_len: int = MAX_LEN
) -> tuple[Rows, KVCache]:
    rows = Rows(max_seqs=3, max_model_len=max_len, num_groups=len(windows), page_tokens=page_tokens)
    return rows, KVCache(rows, PagePool(num_pages), PageHasher(b"secret"), windows)


def request_of(token_ids: Sequence[int], *, is_private: bool = False) -> Request:
    message = GenerateRequest(request_id="a", prompt_ids=list(token_ids), params=SamplingParams())
    return Request(message, 0, 4, frozenset(), np.array(token_ids, np.int32), is_published=not is_private)


def enter(rows: Rows, cache: KVCache, request: Request, hit_pages: int = 0) -> int:
    row = rows.take(request.token_ids, len(request.token_ids))
    cache.attach(request, row, hit_pages)
    request.row = row
    return row


def leave(rows: Rows, cache: KVCache, request: Request) -> None:
    assert request.row is not None
    cache.free(request.row)
    rows.give_back(request.row)
    request.row = None


def compute(rows: Rows, cache: KVCache, request: Request, *chunks: int) -> None:
    """Pages, one step, books, for each chunk."""
    assert request.row is not None
    for chunk in chunks:
        assert cache.extend(request.row, chunk)
        rows.num_computed[request.row] += chunk
        commit(cache, request)
        cache.check({request.row: request})


def commit(cache: KVCache, *requests: Request) -> None:
    by_row = {request.row: request for request in requests if request.row is not None}
    cache.commit(by_row, np.array(list(by_row), np.int32))


def held(rows: Rows, row: int, group: int) -> list[int]:
    """Indices of the pages that the table of a group holds."""
    return np.flatnonzero(rows.page_tables[group, row] != NULL_PAGE).tolist()


def visible_pages(window: int | None, computed: int, page_tokens: int) -> list[int]:
    """Brute force: pages with a computed position that some query at `computed` or later sees."""
    seen = (k for k in range(computed) if window is None or k > computed - window)
    return sorted({k // page_tokens for k in seen})


@pytest.mark.parametrize(
    ("window", "computed", "pages"),
    [
        # page 0 holds 0..3. With W = 6 the query 8 sees 3..8, the query 9 sees 4..9.
        (6, 7, [0, 1]),
        (6, 8, [0, 1]),
        (6, 9, [1, 2]),
        # W = 4, the page size: the query 6 sees 3..6, the query 7 sees 4..7.
        (4, 6, [0, 1]),
        (4, 7, [1]),
        # W = 8: the query 10 sees 3..10, the query 11 sees 4..11.
        (8, 10, [0, 1, 2]),
        (8, 11, [1, 2]),
        # W = 1: a query sees itself alone, nothing computed is of use.
        (1, 4, []),
        (1, 5, []),
    ],
)
def test_a_page_goes_when_the_next_query_sees_none_of_it(
    window: int, computed: int, pages: list[int]
) -> None:
    rows, cache = cache_of([window])
    request = request_of(range(40))
    row = enter(rows, cache, request)
    compute(rows, cache, request, *[1] * computed)
    open_page = [computed // 4] if computed % 4 else []  # it will be written again
    assert held(rows, row, 0) == sorted({*pages, *open_page})


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("page_tokens", [1, 2, 4, 8])
def test_windows_of_every_size_keep_exactly_what_is_seen(window: int, page_tokens: int) -> None:
    chunkings = [[1] * 48, [2] * 24, [7] * 6, [16, 1, 1, 16, 14], [48], [5, 3, 13, 1, 1, 1, 24]]
    for chunks in chunkings:
        rows, cache = cache_of([window, None], page_tokens=page_tokens)
        request = request_of(range(MAX_LEN))
        row = enter(rows, cache, request)
        for chunk in chunks:
            compute(rows, cache, request, chunk)
            computed = int(rows.num_computed[row])
            open_page = {computed // page_tokens} if computed % page_tokens else set()
            for group in (0, 1):
                seen = visible_pages(cache._windows[group], computed, page_tokens)
                assert held(rows, row, group) == sorted({*seen, *open_page})


@pytest.mark.parametrize("window", [1, 255, 256, 257, 258, 512, 513, 4096])
def test_pages_of_256_tokens_keep_exactly_what_is_seen(window: int) -> None:
    P, max_len = 256, 2048
    for chunks in ([512, 1, 255, 256, 257, 511, 1, 1], [255, 1, 1, 1, 254, 512, 512]):
        rows, cache = cache_of([window, None], page_tokens=P, max_len=max_len)
        request = request_of(range(max_len))
        row = enter(rows, cache, request)
        for chunk in chunks:
            compute(rows, cache, request, chunk)
            computed = int(rows.num_computed[row])
            open_page = {computed // P} if computed % P else set()
            for group in (0, 1):
                seen = visible_pages(cache._windows[group], computed, P)
                assert held(rows, row, group) == sorted({*seen, *open_page})


def test_pages_for_decodes_are_had_together_or_not_at_all() -> None:
    rows, cache = cache_of((None, 5), num_pages=11)
    requests = [request_of([index] * 4) for index in range(3)]
    for request in requests:
        row = enter(rows, cache, request)
        assert cache.extend(row, 4)
        rows.num_computed[row] = 4  # six pages
    order = np.array([2, 0, 1], np.int32)
    assert not cache.extend_each(order)
    assert cache.pool.num_free == 5, "nothing taken"
    assert cache.extend(1, 1)  # by a step whose result did not count
    assert cache.extend_each(order[1:])
    assert cache.pool.num_free == 1, "row 1 has its page"
    assert not cache.extend_each(order[:1])
    tables = [held(rows, row, group) for row in range(3) for group in (0, 1)]
    assert tables == [[0, 1], [0, 1], [0, 1], [0, 1], [0], [0]]
    cache.check({row: request for row, request in enumerate(requests)})


@pytest.mark.parametrize("windows", [(None,), (5,), (None, 5), (3, None, 9), (4, 4), (1, None), (17, 2)])
def test_a_commit_names_what_is_known_and_frees_what_nobody_sees(windows: tuple[int | None, ...]) -> None:
    rng = random.Random(1)
    rows, cache = cache_of(windows, num_pages=1000)
    requests = [request_of([index] * MAX_LEN, is_private=index == 2) for index in range(3)]
    num_named = dict.fromkeys([enter(rows, cache, request) for request in requests], 0)
    for _ in range(20):
        some = rng.sample(requests, rng.randint(1, 3))
        for request in some:
            assert request.row is not None
            computed = int(rows.num_computed[request.row])
            chunk = min(rng.choice((1, 1, 2, 3, 7)), MAX_LEN - computed)
            assert cache.extend(request.row, chunk)
            rows.num_computed[request.row] += chunk
            rows.num_pending[request.row] = rng.choice((0, 0, MAX_LEN - computed))
        commit(cache, *some)
        for request in some:
            row = request.row
            assert row is not None
            computed, known = int(rows.num_computed[row]), MAX_LEN - int(rows.num_pending[row])
            if request is not requests[2]:
                num_named[row] = max(num_named[row], min(computed, known) // 4)
            for group, window in enumerate(windows):
                seen = [
                    p for p in range(-(-computed // 4)) if window is None or 4 * p + 3 > computed - window
                ]
                assert held(rows, row, group) == seen
                names = [cache.pool.is_named(page) for page in rows.page_tables[group, row, seen].tolist()]
                assert names == [page_idx < num_named[row] for page_idx in seen]
        cache.check({request.row: request for request in requests if request.row is not None})
    assert sum(num_named.values()) > 10, "the walks are too short"


def naive_hit(present: set[tuple[int, int]], windows: Sequence[int | None], num_tokens: int, P: int) -> int:
    """The longest boundary whose next query finds every key it sees, in every group."""
    for pages in range((num_tokens - 1) // P, 0, -1):
        wanted = ((g, p) for g, w in enumerate(windows) for p in visible_pages(w, pages * P, P))
        if all(page in present for page in wanted):
            return pages
    return 0


@pytest.mark.parametrize(
    "windows", [(None,), (None, 6), (5, None, 5), (9, None, 3), (1, None), (7,), (4, 13), (None, None)]
)
def test_the_hit_is_the_longest_prefix_that_all_groups_hold(windows: tuple[int | None, ...]) -> None:
    rng = random.Random(2)
    hits = set()
    for _ in range(300):
        _, cache = cache_of(windows)
        num_tokens = rng.randrange(1, 41)
        request = request_of([rng.randrange(50) for _ in range(num_tokens)])
        names = cache.page_names(request, num_tokens // 4)
        share = rng.choice((0.5, 0.85, 0.95, 1.0))
        places = itertools.product(range(len(windows)), range(len(names)))
        present = {place for place in places if rng.random() < share}
        for group, page_idx in present:
            page = cache.pool.allocate(1)[0]
            cache.pool.register([page], group, [names[page_idx]])
            if rng.random() < 0.5:
                cache.pool.release(page)
        hit = cache.lookup(request)
        assert hit == naive_hit(present, windows, num_tokens, 4)
        hits.add(hit)
    assert len(hits) > 4, "the cases are too easy"


def test_a_hit_fills_the_tables_with_what_the_next_query_sees() -> None:
    rows, cache = cache_of([None, 6])
    first = request_of(range(24))
    enter(rows, cache, first)
    compute(rows, cache, first, *[1] * 24)
    tables = rows.page_tables[:, 0].copy()
    second = request_of([*range(20), 50, 51])
    hit = cache.lookup(second)
    assert hit == 5
    row = enter(rows, cache, second, hit)
    assert (held(rows, row, 0), held(rows, row, 1)) == ([0, 1, 2, 3, 4], [3, 4])
    assert rows.page_tables[0, row, :5].tolist() == tables[0, :5].tolist()
    assert rows.num_computed[row] == 20
    assert [cache.pool.references(page) for page in tables[0, :5].tolist()] == [2] * 5
    cache.check({0: first, row: second})


def test_new_tokens_of_a_sharer_go_into_pages_of_its_own() -> None:
    rows, cache = cache_of([None])
    first = request_of(range(16))
    enter(rows, cache, first)
    compute(rows, cache, first, 16)
    second = request_of(range(16))
    row = enter(rows, cache, second, cache.lookup(second))
    assert rows.num_computed[row] == 12  # the last token is computed again, into a page of its own
    assert cache.extend(row, 4)
    assert rows.page_tables[0, row, 3] != rows.page_tables[0, 0, 3]


def test_two_rows_that_compute_the_same_prefix_keep_their_own_pages() -> None:
    rows, cache = cache_of([None, 6])
    one, two = request_of(range(20)), request_of(range(20))
    enter(rows, cache, one)
    enter(rows, cache, two)
    for request in (one, two):
        assert cache.extend(request.row, 20)
        rows.num_computed[request.row] = 20
    for request in (one, two):
        commit(cache, request)
    cache.check({one.row: one, two.row: two})
    leave(rows, cache, one)
    leave(rows, cache, two)
    cache.check({})
    assert (cache.pool.num_used, cache.pool.num_cached) == (0, 10)  # five pages in two groups, each once
    assert cache.lookup(request_of(range(20))) == 4


def test_the_tail_of_a_freed_chain_is_evicted_before_its_head() -> None:
    rows, cache = cache_of([None, None], num_pages=12)
    request = request_of(range(25))
    enter(rows, cache, request)
    compute(rows, cache, request, 24)
    leave(rows, cache, request)
    hits = []
    while cache.pool.num_free:
        hits.append(cache.lookup(request_of(range(25))))
        cache.pool.allocate(1)[0]
    assert hits == [6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0]


def test_pages_that_left_the_window_stay_findable() -> None:
    rows, cache = cache_of([6])
    request = request_of(range(40))
    row = enter(rows, cache, request)
    compute(rows, cache, request, *[4] * 8)
    assert held(rows, row, 0) == [6, 7]
    assert cache.pool.num_cached == 6
    assert cache.lookup(request_of([*range(16), 60, 61])) == 4


def test_a_private_request_names_nothing_until_it_is_published() -> None:
    rows, cache = cache_of([None])
    request = request_of(range(16), is_private=True)
    enter(rows, cache, request)
    compute(rows, cache, request, 4, 4)
    other = request_of(range(16))
    assert cache.lookup(other) == 0
    cache.publish(request)
    assert cache.lookup(other) == 2
    compute(rows, cache, request, 4)
    assert cache.lookup(other) == 3


def test_publishing_a_request_without_a_row_takes_effect_later() -> None:
    rows, cache = cache_of([None])
    request = request_of(range(12), is_private=True)
    cache.publish(request)
    enter(rows, cache, request)
    compute(rows, cache, request, 12)
    assert cache.lookup(request_of(range(12))) == 2


def test_without_a_hasher_nothing_is_found() -> None:
    rows = Rows(max_seqs=2, max_model_len=MAX_LEN, num_groups=1, page_tokens=4)
    cache = KVCache(rows, PagePool(40), None, [None])
    request = request_of(range(12))
    enter(rows, cache, request)
    compute(rows, cache, request, 12)
    leave(rows, cache, request)
    assert cache.lookup(request_of(range(12))) == cache.pool.num_cached == 0


def test_extend_takes_all_pages_or_none() -> None:
    rows, cache = cache_of([None, 6], num_pages=7)
    request = request_of(range(40))
    row = enter(rows, cache, request)
    assert not cache.extend(row, 13)  # 4 pages in 2 groups
    assert cache.pool.num_used == 0
    assert not rows.page_tables.any()
    assert cache.extend(row, 12)
    assert cache.pool.num_used == 6
    assert cache.extend(row, 9), "a smaller chunk has its pages"
    assert cache.pool.num_used == 6


@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6), (5, None, 5), (3, 9, None)])
def test_pages_foreseen_at_admission_suffice(windows: tuple[int | None, ...]) -> None:
    rng = random.Random(3)
    for _ in range(60):
        rows, cache = cache_of(windows)
        first = request_of(range(rng.randrange(1, MAX_LEN)))
        enter(rows, cache, first)
        compute(rows, cache, first, len(first.token_ids))
        if rng.random() < 0.5:
            leave(rows, cache, first)
        request = request_of([*range(rng.randrange(MAX_LEN - 8)), 50, 51])
        hit, chunk_max = cache.lookup(request), rng.randrange(1, 12)
        free = cache.pool.num_free
        foreseen = cache.admission_cost(request, hit, chunk_max)
        row = enter(rows, cache, request, hit)
        woken = free - cache.pool.num_free
        assert foreseen == woken + cache.pages_to_come(row, chunk_max), "two ways to count the same"
        start = lowest = cache.pool.num_free
        while (left := int(rows.num_tokens[row] - rows.num_computed[row])) > 0:
            chunk = rng.randint(1, min(chunk_max, left))
            to_come = cache.pages_to_come(row, chunk_max)
            before = cache.pool.num_free
            assert cache.extend(row, chunk)
            assert before - cache.pool.num_free <= to_come
            lowest = min(lowest, cache.pool.num_free)
            rows.num_computed[row] += chunk
            commit(cache, request)
        assert start - lowest <= foreseen - woken
        assert cache.pages_to_come(row, chunk_max) == 0
        if windows == (None,):
            assert start - lowest == foreseen - woken


def second_owner_of_an_open_page(rows: Rows, cache: KVCache) -> None:
    rows.page_tables[0, 1, 4] = rows.page_tables[0, 0, 4]
    cache._end_page[1] = 5


def lost_entry(rows: Rows, cache: KVCache) -> None:
    rows.page_tables[0, 0, 2] = NULL_PAGE


def entry_without_reference(rows: Rows, cache: KVCache) -> None:
    rows.page_tables[0, 0, 5] = 150


def outlived_window(rows: Rows, cache: KVCache) -> None:
    rows.page_tables[1, 0, 0] = cache.pool.allocate(1)[0]


def entry_beyond_the_end(rows: Rows, cache: KVCache) -> None:
    rows.page_tables[0, 0, 9] = cache.pool.allocate(1)[0]


def leaked_page(rows: Rows, cache: KVCache) -> None:
    cache.pool.allocate(1)[0]


def name_of_an_open_page(rows: Rows, cache: KVCache) -> None:
    cache.pool.register([int(rows.page_tables[0, 0, 4])], 0, [b"early"])


def page_of_a_free_row(rows: Rows, cache: KVCache) -> None:
    rows.page_tables[0, 2, 0] = cache.pool.allocate(1)[0]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (second_owner_of_an_open_page, "wrong references"),
        (lost_entry, "a page is used by nobody"),
        (entry_without_reference, "wrong references"),
        (outlived_window, "a page outlived its window"),
        (entry_beyond_the_end, "pages beyond the end of a row"),
        (leaked_page, "a page is used by nobody"),
        (name_of_an_open_page, "a page that is written is findable"),
        (page_of_a_free_row, "a free row holds pages"),
    ],
)
def test_check_finds_corrupt_books(corrupt: Callable[[Rows, KVCache], None], message: str) -> None:
    rows, cache = cache_of([None, 6])
    one, two = request_of(range(30)), request_of(range(30, 60))
    for request in (one, two):
        enter(rows, cache, request)
        compute_alone = {r.row: r for r in (one, two) if r.row is not None}
        assert cache.extend(request.row, 18)
        rows.num_computed[request.row] = 18
        commit(cache, request)
        cache.check(compute_alone)
    corrupt(rows, cache)
    with pytest.raises(AssertionError, match=message):
        cache.check({one.row: one, two.row: two})


def test_check_finds_a_written_page_with_two_owners() -> None:
    rows, cache = cache_of([None])
    one, two = request_of(range(30)), request_of(range(30))
    for request in (one, two):
        enter(rows, cache, request)
        assert cache.extend(request.row, 4)
    page = int(rows.page_tables[0, one.row, 0])
    cache.pool.release(int(rows.page_tables[0, two.row, 0]))
    cache.pool._references[page] += 1
    rows.page_tables[0, two.row, 0] = page
    with pytest.raises(AssertionError, match="a page that is written has two owners"):
        cache.check({one.row: one, two.row: two})
