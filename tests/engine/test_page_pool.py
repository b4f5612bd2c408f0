"""The page pool: orders typed by hand, then random walks beside a naive model with lists and dicts."""

import random
from collections.abc import Callable

import pytest

from cabochon.engine.page_pool import PagePool


def names(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


def test_every_page_but_the_null_page_is_handed_out_once() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert (pool.num_free, pool.num_cached, pool.num_used) == (0, 0, 5)
    pool.check()


def test_pages_without_a_name_are_reused_before_cached_ones() -> None:
    pool = PagePool(3)
    named, nameless, last = pool.allocate(3)
    pool.register([named], 0, [b"x"])
    for page in (named, nameless, last):
        pool.release(page)
    assert pool.allocate(3) == [last, nameless, named]


def test_the_least_recently_released_content_is_evicted_first() -> None:
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page, name in zip(pages, names("a", "b", "c"), strict=True):
        pool.register([page], 0, [name])
    for idx in (1, 2, 0):
        pool.release(pages[idx])
    pool.share(pages[1])  # used again: now the most recent
    pool.release(pages[1])
    assert pool.num_cached == 3
    assert pool.allocate(3) == [pages[2], pages[0], pages[1]]
    assert [pool.lookup(0, name) for name in names("a", "b", "c")] == [None, None, None]


def test_a_page_leaves_the_middle_of_the_free_list() -> None:
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page, name in zip(pages, names("a", "b", "c"), strict=True):
        pool.register([page], 0, [name])
        pool.release(page)
    pool.share(pages[1])
    pool.check()
    assert (pool.num_used, pool.num_cached) == (1, 2)
    assert pool.allocate(2) == [pages[0], pages[2]]


def test_a_shared_page_is_free_when_its_last_owner_releases_it() -> None:
    pool = PagePool(2)
    page = pool.allocate(1)[0]
    pool.register([page], 0, [b"a"])
    pool.share(page)
    pool.release(page)
    assert (pool.references(page), pool.num_used) == (1, 1)
    pool.release(page)
    assert (pool.num_used, pool.num_cached) == (0, 1)
    assert pool.lookup(0, b"a") == page


def test_groups_do_not_share_names() -> None:
    pool = PagePool(2)
    page = pool.allocate(1)[0]
    pool.register([page], 0, [b"a"])
    assert pool.lookup(1, b"a") is None


def test_the_second_page_of_a_name_stays_nameless() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.register([first], 0, [b"a"])
    pool.register([second], 0, [b"a"])
    assert pool.lookup(0, b"a") == first
    assert not pool.is_named(second)
    pool.check()


def test_a_name_is_kept_for_good() -> None:
    pool = PagePool(1)
    page = pool.allocate(1)[0]
    pool.register([page], 0, [b"a"])
    pool.register([page], 0, [b"b"])
    assert (pool.lookup(0, b"a"), pool.lookup(0, b"b")) == (page, None)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda pool: pool.allocate(3), "no free page"),
        (lambda pool: pool.release(1), "released more often than owned"),
        (lambda pool: pool.share(pool.allocate(1)[0]), "only named pages are shared"),
        (lambda pool: pool.register([1], 0, [b"a"]), "only pages in use are named"),
    ],
)
def test_misuse_is_caught(misuse: Callable[[PagePool], object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        misuse(PagePool(2))


def corrupt_references(pool: PagePool) -> None:
    pool._references[pool._blank[-1]] += 1


def corrupt_negative(pool: PagePool) -> None:
    pool._references[pool._blank[-1]] = -1


def corrupt_blank(pool: PagePool) -> None:
    pool._blank.append(pool._cached.popitem()[0])


def corrupt_cached(pool: PagePool) -> None:
    pool._cached[pool._blank.pop()] = None


def corrupt_names(pool: PagePool) -> None:
    pool._page_of[0][b"ghost"] = 1


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_references, r"used \+ blank \+ cached is not all"),
        (corrupt_negative, "negative references"),
        (corrupt_blank, "a blank page has a name"),
        (corrupt_cached, "a cached page has no name"),
        (corrupt_names, "names and pages disagree"),
    ],
)
def test_check_finds_a_corrupt_pool(corrupt: Callable[[PagePool], None], message: str) -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    pool.register([pages[0]], 0, [b"a"])
    pool.release(pages[0])
    pool.check()
    corrupt(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check()


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_random_steps_agree_with_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(12)
    free = list(range(1, 13))  # in the order of reuse
    owners: dict[int, int] = {}
    named: dict[int, tuple[int, bytes]] = {}
    for _ in range(10_000):
        action = rng.choice(("allocate", "share", "release", "release", "register"))
        if action == "allocate" and free:
            count = rng.randint(1, min(3, len(free)))
            pages, free = free[:count], free[count:]
            assert pool.allocate(count) == pages
            for page in pages:
                owners[page] = 1
                named.pop(page, None)
        elif action == "share" and named:
            page = rng.choice(list(named))
            pool.share(page)
            if page in free:
                free.remove(page)
            owners[page] = owners.get(page, 0) + 1
        elif action == "release" and owners:
            page = rng.choice(list(owners))
            pool.release(page)
            owners[page] -= 1
            if not owners[page]:
                del owners[page]
                free.insert(len(free) if page in named else 0, page)
        elif action == "register" and owners:
            pages, group = rng.choices([0, *owners], k=3), rng.randrange(2)  # 0: the null page
            contents = [bytes([rng.randrange(8)]) for _ in pages]
            pool.register(pages, group, contents)
            for page, content in zip(pages, contents, strict=True):
                if page and page not in named and (group, content) not in named.values():
                    named[page] = (group, content)
        pool.check()
        assert (pool.num_free, pool.num_used) == (len(free), len(owners))
        assert pool.num_cached == sum(page in named for page in free)
        for page, name in named.items():
            assert pool.lookup(*name) == page
        assert all(pool.references(page) == count for page, count in owners.items())
