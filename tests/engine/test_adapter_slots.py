"""Slots of adapters: who gets one, who gives way, and that nobody waits for ever."""

import statistics
from collections.abc import Callable

import pytest
from paged_world import World, prompt_of, request

from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.adapters.slots import AdapterSlots, LoadedAdapter
from cabochon.engine.rows import NO_ADAPTER


def adapter(name: str, uid: int = 0) -> LoadedAdapter:
    return LoadedAdapter(name, uid, Adapter(8, [], None))


A, B, C = adapter("a"), adapter("b"), adapter("c")


def enter(slots: AdapterSlots, one: LoadedAdapter | None, priority: int = 0) -> int:
    assert slots.may_enter(one, priority)
    return slots.take(one, priority)


def test_the_base_model_needs_no_slot() -> None:
    slots = AdapterSlots(0)
    assert enter(slots, None) == NO_ADAPTER
    slots.release(NO_ADAPTER)
    assert not slots.may_enter(A, 0)


def test_requests_of_one_adapter_share_its_slot() -> None:
    slots = AdapterSlots(2)
    assert enter(slots, A) == enter(slots, A)
    assert enter(slots, B) != enter(slots, A)
    assert slots.take_changes() == [(0, A), (1, B)]
    assert slots.take_changes() == []
    assert slots.resident == ["a", "b"]


def test_the_least_recently_used_idle_adapter_gives_way() -> None:
    slots = AdapterSlots(2)
    first, second = enter(slots, A), enter(slots, B)
    slots.release(first)
    slots.release(second)
    slots.release(enter(slots, A))
    assert enter(slots, C) == second
    assert slots.resident == ["a", "c"]


def test_who_finds_no_slot_gets_the_next_that_is_idle_and_later_requests_of_its_adapter_wait() -> None:
    waiting = {C: {0: 1}}
    slots = AdapterSlots(2, waiting)
    enter(slots, A)
    enter(slots, A)
    busy = enter(slots, B)
    assert not slots.may_enter(C, 0)
    assert slots.awaited == ["c"]
    assert slots.may_enter(A, 0), "only one slot is claimed, that with the fewest requests"
    assert not slots.may_enter(B, 0)
    assert slots.may_enter(B, -1), "better requests do not respect the claim of a worse one"
    slots.release(busy)
    assert not slots.may_enter(B, 0), "it is idle, and kept for c"
    assert enter(slots, C) == busy


def test_a_claim_ends_with_the_last_request_that_made_it() -> None:
    waiting = {C: {0: 1}}
    slots = AdapterSlots(1, waiting)
    enter(slots, A)
    assert not slots.may_enter(C, 0)
    assert not slots.may_enter(A, 0)
    del waiting[C]
    assert slots.may_enter(A, 0)


def test_a_claim_has_the_priority_of_the_best_request_that_waits_for_it() -> None:
    waiting = {C: {9: 1}}
    slots = AdapterSlots(1, waiting)
    enter(slots, A)
    assert not slots.may_enter(C, 9)
    assert slots.may_enter(A, 5)
    waiting[C] = {0: 1, 9: 1}
    assert not slots.may_enter(C, 0)
    assert not slots.may_enter(A, 5), "it passes a better one"
    waiting[C] = {9: 1}
    assert slots.may_enter(A, 5), "the better one has gone"


def test_those_who_wait_when_their_adapter_gets_a_slot_join_it_and_later_ones_respect_claims() -> None:
    waiting = {A: {0: 2}, B: {0: 1}}
    slots = AdapterSlots(1, waiting)
    enter(slots, A)
    assert not slots.may_enter(B, 0)
    enter(slots, A)
    enter(slots, A)
    assert not slots.may_enter(A, 0)


def test_two_adapters_that_share_a_slot_run_in_batches() -> None:
    world = World(max_loras=1, max_seqs=8, num_pages=200, step_tokens=32)
    running = []
    for index in range(60):
        for adapter in "ab":
            name = f"{adapter}{index}"
            world.add(request(name, prompt_of(4, seed=index), 6, ignore_eos=True, adapter=adapter))
        world.step()
        running.append(world.scheduler.stats().running)
    assert statistics.mean(running) > 5
    world.run()
    assert len(world.reasons) == 120


@pytest.mark.parametrize("end", ["runs out", "is aborted"])
def test_a_request_that_has_ended_keeps_no_adapter_alive(end: str) -> None:
    world = World(max_loras=1)
    world.add(request("a", prompt_of(5), 3, adapter="a"))
    (ended,) = world.scheduler._requests.values()
    world.step()
    assert ended.adapter is not None
    finish: Callable[[], object] = world.run if end == "runs out" else lambda: world.scheduler.abort("a")
    finish()
    assert ended.adapter is None


def test_an_unloaded_adapter_leaves_with_its_last_request() -> None:
    slots = AdapterSlots(1)
    slot = enter(slots, A)
    slots.take_changes()
    slots.forget(A)
    assert set(slots.resident) == {"a"}
    slots.release(slot)
    assert slots.resident == []
    assert slots.take_changes() == [(slot, None)]
    slots.forget(B)  # never had one


def test_two_versions_of_an_adapter_are_two_adapters_of_one_name() -> None:
    slots = AdapterSlots(2)
    assert enter(slots, adapter("a", 1)) != enter(slots, adapter("a", 2))
    assert set(slots.resident) == {"a"}


def test_a_request_that_waits_for_a_slot_blocks_nobody_else() -> None:
    world = World(max_loras=1, max_seqs=4, num_pages=100)
    world.add(request("long", prompt_of(5), max_tokens=40, ignore_eos=True, adapter="a"))
    world.step()
    world.add(request("waits", prompt_of(6), adapter="b"))
    world.add(request("passes", prompt_of(7), max_tokens=4))
    for _ in range(6):
        world.step()
    assert "passes" in world.reasons
    assert world.outputs["waits"] == []
    assert world.scheduler.stats().waiting_adapters == ["b"]
    world.run()
    assert {"waits", "long"} <= set(world.reasons)


def test_a_busy_adapter_does_not_keep_its_slot_for_ever() -> None:
    """Always two requests of one adapter are open; a third, of another, ends all the same."""
    world = World(max_loras=1, max_seqs=4, num_pages=100)
    for index in range(40):
        world.add(request(f"a{index}", prompt_of(5, seed=index), max_tokens=8, ignore_eos=True, adapter="a"))
        if index == 2:
            world.add(request("b", prompt_of(6), max_tokens=2, adapter="b"))
        for _ in range(4):
            world.step()
        if "b" in world.reasons:
            return
    raise AssertionError("it starved")
