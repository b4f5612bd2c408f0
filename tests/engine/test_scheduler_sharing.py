"""Prefix sharing as requests see it: hits, who waits for whom, salts, private pages."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paged_world import World, expected_output, prompt_of, request

from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams


def test_a_second_prompt_shares_the_pages_of_the_first() -> None:
    world = World()
    prompt = prompt_of(22)
    world.add(request("a", prompt))
    world.run()
    world.add(request("b", [*prompt, 7, 8]))
    world.run()
    assert world.cached_tokens == {"a": 0, "b": 20}
    assert world.outputs["b"] == expected_output([*prompt, 7, 8], 4)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    world = World()
    prompt = prompt_of(16)
    for name in "ab":
        world.add(request(name, prompt))
        world.run()
    assert world.cached_tokens["b"] == 12  # 16 would leave nothing to compute logits from


def test_the_next_turn_of_a_chat_hits_the_answer_too() -> None:
    world = World(max_model_len=80, num_pages=100)
    prompt = prompt_of(12)
    world.add(request("a", prompt, max_tokens=21, ignore_eos=True))
    world.run()
    world.add(request("b", [*prompt, *world.outputs["a"], *prompt_of(6, seed=5)]))
    world.run()
    assert world.cached_tokens["b"] == 32  # 12 + 21 − 1 tokens have K and V


def test_requests_that_arrive_together_compute_a_shared_prefix_once() -> None:
    world = World(step_tokens=64, max_seqs=8, num_pages=100)
    prompt = prompt_of(40)
    for i in range(4):
        world.add(request(f"{i}", [*prompt, 2 + i], max_tokens=2))
    world.run()
    assert sum(plan.num_tokens for plan in world.plans) < 41 + 3 * 1 + 4 * 2 + 3
    assert [world.cached_tokens[f"{i}"] for i in range(4)] == [0, 40, 40, 40]


def test_no_hit_across_salts_or_adapters() -> None:
    world = World(max_loras=1, num_pages=100)
    prompt = prompt_of(22)
    for name, fields in (
        ("a", {}),
        ("b", {"cache_salt": "x"}),
        ("c", {"cache_salt": "y"}),
        ("d", {"adapter": "x"}),
        ("e", {"adapter": "y"}),
    ):
        world.add(request(name, prompt, **fields))
        world.run()
    world.add(request("f", prompt, cache_salt="x"))
    world.add(request("g", prompt, adapter="x"))
    world.run()
    assert world.cached_tokens == {"a": 0, "b": 0, "c": 0, "d": 0, "e": 0, "f": 20, "g": 20}


def test_an_adapter_that_takes_the_name_of_another_finds_none_of_its_pages() -> None:
    world = World(max_loras=1)
    world.add(request("old", prompt_of(22), adapter="x"))
    world.run()
    world.unload("x")
    world.add(request("new", prompt_of(22), adapter="x"))
    world.run()
    assert world.cached_tokens == {"old": 0, "new": 0}


def test_private_pages_are_offered_only_after_publish() -> None:
    world = World(max_model_len=80, num_pages=100, step_tokens=64)
    prompt = prompt_of(22)
    world.add(request("private", prompt, max_tokens=40, ignore_eos=True, is_private=True))
    world.step()
    world.step()
    world.add(request("early", prompt, max_tokens=1))
    world.step()
    assert world.cached_tokens["early"] == 0
    world.scheduler.publish("private")
    world.add(request("late", prompt, max_tokens=1))
    world.run()
    assert world.cached_tokens["late"] == 20


def test_a_private_request_that_is_aborted_leaves_nothing_behind() -> None:
    world = World()
    world.add(request("private", prompt_of(22), is_private=True))
    for _ in range(3):
        world.step()
    world.scheduler.abort("private")
    assert world.pool.num_cached == world.pool.num_used == 0


def test_without_prefix_caching_nothing_is_kept() -> None:
    world = World(caching=False)
    for name in "ab":
        world.add(request(name, prompt_of(22)))
        world.run()
    assert world.cached_tokens["b"] == world.pool.num_cached == 0


def test_an_urgent_request_does_not_wait_for_a_prefix_of_a_starved_one() -> None:
    world = World(max_seqs=8, step_tokens=16, num_pages=800, max_model_len=200, windows=(None,))
    prompt = prompt_of(100)
    world.add(request("low", prompt, priority=5))
    world.step()
    world.add(request("urgent", [*prompt, 3], priority=0))
    for i in range(15):  # enough to take the whole budget
        world.add(request(f"{i}", prompt_of(60, seed=100 + i), max_tokens=1))
        world.step()
    assert world.outputs["urgent"]
    assert not world.outputs["low"]


def test_who_waits_for_a_shared_prefix_computes_it_if_the_other_dies() -> None:
    world = World(step_tokens=8, max_seqs=4, num_pages=100)
    prompt = prompt_of(40)
    world.add(request("first", prompt))
    world.add(request("second", [*prompt, 3]))
    for _ in range(3):
        world.step()
    assert world.scheduler.stats().running == 1, "the second waits for the pages of the first"
    world.scheduler.abort("first")
    world.run()
    assert world.outputs["second"] == expected_output([*prompt, 3], 4)
    assert world.cached_tokens["second"] == 24  # what the first had computed


def test_who_comes_while_a_shared_prefix_is_computed_waits_for_all_of_it() -> None:
    world = World(step_tokens=16, max_seqs=4, num_pages=200, max_model_len=120)
    prompt = prompt_of(100)
    world.add(request("first", prompt))
    world.step()
    world.add(request("second", [*prompt[:80], 3], max_tokens=1))
    world.run()
    assert world.cached_tokens["second"] == 80


def test_a_prefix_of_which_one_token_is_left_is_waited_for() -> None:
    world = World(step_tokens=31, max_seqs=4, num_pages=200, max_model_len=120, page_tokens=16)
    world.add(request("first", prompt_of(32), max_tokens=1))
    world.step()
    world.add(request("second", [*prompt_of(32), 3], max_tokens=1))
    world.run()
    assert world.cached_tokens["second"] == 32


def test_a_prefix_is_waited_for_behind_what_its_prompt_logprobs_make_it_compute_again() -> None:
    world = World(step_tokens=16, max_seqs=4, num_pages=400, max_model_len=300, windows=(None,))
    prompt = prompt_of(200)
    world.add(request("cached", prompt[:40], max_tokens=1))
    world.run()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    world.add(GenerateRequest(request_id="scored", prompt_ids=prompt, params=params))
    world.step()
    world.add(request("second", [*prompt[:160], 3], max_tokens=1))
    world.run()
    assert world.cached_tokens["second"] == 160


def test_a_prefix_is_waited_for_while_the_mask_of_its_first_token_is_late() -> None:
    world = World(step_tokens=64, max_seqs=8, num_pages=200, max_model_len=80)
    matcher: Any = SimpleNamespace(is_late=False)
    for i in range(4):
        world.outputs[f"{i}"] = []
        message = request(f"{i}", [*prompt_of(40), 2 + i], max_tokens=1)
        world.scheduler.add(message, matcher=matcher if i == 0 else None)
    num_tokens = 0
    for step in range(20):
        matcher.is_late = 0 < step < 6
        plan = world.scheduler.schedule()
        if plan is None:
            continue
        num_tokens += plan.num_tokens
        sampled = plan.rows[plan.samples].tolist()
        for row in sampled:
            if step < 6 and world.scheduler.request(row).matcher is not None:
                matcher.is_late = True
                world.scheduler.defer(row)
        world.scheduler.update(plan, np.full(len(sampled), 3, np.int32))
        world.scheduler.check()
    assert not world.scheduler.has_work
    assert num_tokens == 41 + 41 + 3, "its own chunk again, and the others' last tokens"


@pytest.mark.parametrize("num_steps", range(1, 12))
def test_pages_published_while_steps_are_in_flight_are_those_of_known_tokens(num_steps: int) -> None:
    world = World(max_model_len=80, num_pages=100, step_tokens=64, depth=2)
    world.add(request("a", prompt_of(9), max_tokens=30, ignore_eos=True, is_private=True))
    for _ in range(num_steps):
        world.step()
    world.step(in_flight=lambda: world.scheduler.publish("a"))
    world.scheduler.check()
    world.run()


def test_a_prefix_that_is_private_is_waited_for_by_nobody() -> None:
    world = World(step_tokens=16, max_seqs=4, num_pages=100)
    world.add(request("private", prompt_of(40), is_private=True))
    world.add(request("public", prompt_of(40)[:20]))
    world.step()
    assert world.scheduler.stats().running == 2


def test_copies_of_one_prompt_compute_it_once() -> None:
    world = World(step_tokens=64, max_seqs=8, num_pages=200)
    for i in range(6):
        world.add(request(f"{i}", prompt_of(40), max_tokens=1))
    world.run()
    assert sum(plan.num_tokens for plan in world.plans) == 40 + 5 * 4  # the last page is never a hit
    assert world.scheduler.stats().prefix_hits == 5 * 36


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    world = World(num_pages=16, max_seqs=2, windows=(None,), max_model_len=40)
    for name in "ab":
        world.add(request(name, prompt_of(9, seed=ord(name)), max_tokens=30, ignore_eos=True))
    world.run()
    stats = world.scheduler.stats()
    assert stats.preemptions > 0
    assert world.cached_tokens == {"a": 0, "b": 0}
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (18, 0, 18)
    assert stats.generation_tokens == 60
