"""Verdicts are kept for a while, never texts, and a call is shared by all who wait for it."""

import asyncio
import gc

import pytest

from cabochon.server.armor.verdict_cache import VerdictCache
from cabochon.server.armor.verdicts import Verdict

PASS, BLOCK = Verdict(outcome="pass"), Verdict(outcome="block", filters=("csam",))
REWRITE = Verdict(outcome="rewrite", rewritten="mail [EMAIL]", filters=("sdp",))
UNCHECKED = Verdict(outcome="unchecked", reason="timeout")


class Service:
    """Answers `verdict` when `go` is set, and counts who asked."""

    def __init__(self, verdict: Verdict = PASS) -> None:
        self.verdict = verdict
        self.go = asyncio.Event()
        self.go.set()
        self.num_asked = self.num_cancelled = 0

    async def __call__(self) -> Verdict:
        self.num_asked += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return self.verdict


@pytest.mark.parametrize(("verdict", "num_asked"), [(PASS, 1), (BLOCK, 1), (REWRITE, 1), (UNCHECKED, 2)])
def test_what_was_checked_is_kept(verdict: Verdict, num_asked: int) -> None:
    async def run() -> None:
        cache, service = VerdictCache(600), Service(verdict)
        key = cache.key("t", "text")
        assert [await cache.find_or_ask(key, service) for _ in range(2)] == [verdict] * 2
        assert service.num_asked == num_asked
        assert len(cache) == 2 - num_asked

    asyncio.run(run())


def test_it_is_kept_for_a_while_only_and_the_least_used_goes_first() -> None:
    async def run() -> None:
        now = 0.0
        cache, service = VerdictCache(600, 2, lambda: now), Service()
        keys = [cache.key("t", text) for text in "abc"]
        for key in (keys[0], keys[1], keys[0], keys[2]):
            await cache.find_or_ask(key, service)
        assert [cache.find(key) for key in keys] == [PASS, None, PASS]
        now = 600.0
        assert [cache.find(key) for key in keys] == [None] * 3
        assert len(cache) == 0

    asyncio.run(run())


def test_nothing_is_kept_for_no_time_but_calls_are_shared() -> None:
    async def run() -> None:
        cache, service = VerdictCache(0), Service()
        key = cache.key("t", "text")
        await asyncio.gather(*(cache.find_or_ask(key, service) for _ in range(5)))
        assert (service.num_asked, len(cache)) == (1, 0)
        await cache.find_or_ask(key, service)
        assert service.num_asked == 2

    asyncio.run(run())


def test_who_goes_takes_the_call_from_nobody_and_the_last_one_ends_it() -> None:
    async def run() -> None:
        cache, service = VerdictCache(600), Service()
        service.go.clear()
        key = cache.key("t", "text")
        waiting = [asyncio.create_task(cache.find_or_ask(key, service)) for _ in range(3)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        await asyncio.sleep(0.01)
        assert service.num_cancelled == 0
        service.go.set()
        assert await asyncio.gather(*waiting[1:]) == [PASS, PASS]

        service.go.clear()
        other = cache.key("t", "other")
        waiting = [asyncio.create_task(cache.find_or_ask(other, service)) for _ in range(2)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        late = asyncio.create_task(cache.find_or_ask(other, service))  # does not join what ends
        await asyncio.sleep(0.01)
        assert service.num_cancelled == 1
        service.go.set()
        assert await late == PASS
        assert service.num_asked == 3

    asyncio.run(run())


def test_keys_depend_on_every_part_and_on_the_process() -> None:
    cache = VerdictCache(600)
    parts = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("abc", ""),
        (("a",), "b"),
        (("a", "b"),),
        ((), "a", "b"),
        "\ud800",
    ]
    assert len({cache.key(*part) for part in parts}) == len(parts)
    assert cache.key("a", ("b",)) == cache.key("a", ("b",))
    assert cache.key("a") != VerdictCache(600).key("a")


def test_no_text_stays_in_memory() -> None:
    async def run() -> None:
        cache, service = VerdictCache(600), Service()
        await cache.find_or_ask(cache.key("t", "canary-" + "4471"), service)
        found = gc.get_referents(cache.__dict__, *cache._kept.items(), *cache._kept.values())
        assert "canary" not in repr(found)
        assert len(cache) == 1

    asyncio.run(run())
