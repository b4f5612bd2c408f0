"""What is told of cached pages, and in which order. Whether it is all: see test_scheduler_machine."""

import numpy as np
import pytest
from kv_event_replay import Replay, Told
from paged_world import World, prompt_of, request

from cabochon.engine.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvents,
    on_wire,
    public_hash,
)

CLEARED = AllBlocksCleared()


def page(*token_ids: int) -> bytes:
    return np.array(token_ids, np.int32).tobytes()


def of(*names: bytes) -> list[int]:
    return [public_hash(name) for name in names]


@pytest.fixture
def events() -> KVEvents:
    """Pages of two tokens, group 1 is global. AllBlocksCleared has been told."""
    events = KVEvents(2, [1])
    assert events.take(9) == [CLEARED]
    assert not events.has_more
    return events


def told(world: World) -> dict[int, Told]:
    replay = Replay()
    world.events.restart()
    while world.events.has_more:
        replay.follow(world.events.take(5))
    return replay.pages


def prefixes(world: World) -> set[tuple[int, ...] | None]:
    return {one.prefix for one in told(world).values()}


def test_a_hash_is_the_last_eight_bytes_as_the_router_shortens_longer_names() -> None:
    assert public_hash(bytes(range(16))) == 0x08090A0B0C0D0E0F
    assert public_hash(b"\xff" * 16) == 2**64 - 1


def test_pages_in_a_row_are_one_event_and_others_have_their_own(events: KVEvents) -> None:
    events.store(b"a", None, page(5, 6), None)
    events.store(b"b", b"a", page(7, 8), None)
    events.store(b"x", None, page(9, 9), None)
    events.store(b"c", b"b", page(1, 2), None)
    assert events.take(9) == [
        BlockStored(of(b"a", b"b"), None, [5, 6, 7, 8], 2),
        BlockStored(of(b"x"), None, [9, 9], 2),
        BlockStored(of(b"c"), public_hash(b"b"), [1, 2], 2),
    ]


def test_a_page_is_told_once(events: KVEvents) -> None:
    events.store(b"a", None, page(5, 6), None)
    events.take(9)
    events.store(b"a", None, page(5, 6), None)
    assert events.take(9) == []


def test_a_page_that_comes_and_goes_in_between_is_not_told(events: KVEvents) -> None:
    events.store(b"a", None, page(5, 6), None)
    events.lose(1, b"a")
    assert not events.has_more
    assert events.take(9) == []


def test_a_page_that_goes_and_comes_back_is_removed_first(events: KVEvents) -> None:
    events.store(b"a", None, page(5, 6), None)
    events.take(9)
    events.lose(1, b"a")
    events.store(b"a", None, page(5, 6), None)
    assert events.take(9) == [BlockRemoved(of(b"a")), BlockStored(of(b"a"), None, [5, 6], 2)]


def test_only_what_was_told_is_removed_and_a_sliding_group_says_nothing(events: KVEvents) -> None:
    events.store(b"a", None, page(5, 6), None)
    events.take(9)
    events.lose(0, b"a")
    events.lose(1, b"other")
    assert not events.has_more
    events.lose(1, b"a")
    events.lose(1, b"a")
    assert events.take(0) == [BlockRemoved(of(b"a"))]


def test_what_is_too_much_for_one_message_is_left_for_the_next(events: KVEvents) -> None:
    for name, parent in ((b"a", None), (b"b", b"a"), (b"c", b"b")):
        events.store(name, parent, page(1, 1), None)
    assert events.take(2) == [BlockStored(of(b"a", b"b"), None, [1, 1, 1, 1], 2)]
    assert events.has_more
    events.lose(1, b"a")
    assert events.take(2) == [BlockRemoved(of(b"a")), BlockStored(of(b"c"), public_hash(b"b"), [1, 1], 2)]
    assert not events.has_more


def test_a_restart_tells_what_is_there_and_not_what_is_gone(events: KVEvents) -> None:
    events.store(b"a", None, page(1, 2), None)
    events.store(b"b", None, page(3, 4), None)
    events.take(9)
    events.lose(1, b"a")
    events.restart()
    assert events.take(9) == [CLEARED, BlockStored(of(b"b"), None, [3, 4], 2)]


def test_the_arrays_are_those_that_vllm_sends(events: KVEvents) -> None:
    """In the order of vLLM's fields; it has no default for the first seven, and no group is named."""
    events.store(b"a", None, page(5, 6), None)
    events.take(0)
    assert [on_wire(event) for event in (CLEARED, BlockRemoved([7]), *events.take(9))] == [
        ("AllBlocksCleared",),
        ("BlockRemoved", [7], "GPU"),
        ("BlockStored", of(b"a"), None, [5, 6], 2, None, "GPU", None),
    ]


def test_a_prompt_and_its_output_are_told_page_by_page() -> None:
    world = World(windows=(None, 6))
    prompt = prompt_of(9)
    world.add(request("a", prompt, 6, ignore_eos=True))
    world.run()
    known = [*prompt, *world.outputs["a"]][:14]  # the last token is never computed
    assert prefixes(world) == {tuple(known[:4]), tuple(known[:8]), tuple(known[:12])}


def test_pages_with_a_salt_are_not_told() -> None:
    world = World()
    world.add(request("a", prompt_of(9), cache_salt="tenant"))
    world.run()
    assert world.pool.num_cached > 0
    assert told(world) == {}


def test_pages_of_a_private_request_are_told_when_it_is_published() -> None:
    world = World()
    prompt = prompt_of(9)
    world.add(request("a", prompt, 8, is_private=True, ignore_eos=True))
    world.step()
    assert told(world) == {}
    world.scheduler.publish("a")
    assert prefixes(world) == {tuple(prompt[:4]), tuple(prompt[:8])}


def test_disowned_pages_are_removed() -> None:
    world = World()
    world.add(request("a", prompt_of(9), 8, ignore_eos=True))
    world.step()
    assert len(told(world)) == 2
    world.cache.disown(world.scheduler._requests["a"])
    assert world.events.take(9) == [BlockRemoved(of(*world.names_of(prompt_of(9), None, None)))]


def test_pages_of_an_adapter_have_its_name_and_go_when_it_is_replaced() -> None:
    world = World(max_loras=2, step_tokens=32)
    world.add(request("a", prompt_of(9), 12, adapter="poet", ignore_eos=True))
    world.add(request("b", prompt_of(9), 12, ignore_eos=True))
    world.step()
    assert {one.lora_name for one in told(world).values()} == {"poet", None}
    assert len(told(world)) == 4
    world.unload("poet")
    assert {one.lora_name for one in told(world).values()} == {None}
    world.run()  # its request goes on, and fills pages that no new request can hit
    assert {one.lora_name for one in told(world).values()} == {None}
    world.add(request("c", prompt_of(9), 1, adapter="poet"))
    world.run()
    assert world.cached_tokens["c"] == 0
    assert [one.lora_name for one in told(world).values()].count("poet") == 2


def test_a_page_that_one_of_two_global_groups_lost_is_removed() -> None:
    world = World(windows=(None, None))
    world.add(request("a", prompt_of(9), 8, ignore_eos=True))
    world.step()
    assert len(told(world)) == 2
    world.pool.forget(int(world.rows.page_tables[1, 0, 0]))
    assert world.events.take(9) == [BlockRemoved(of(world.names_of(prompt_of(9), None, None)[0]))]


def test_a_model_without_global_layers_tells_nothing() -> None:
    world = World(windows=(6,))
    world.add(request("a", prompt_of(9)))
    world.run()
    assert told(world) == {}
