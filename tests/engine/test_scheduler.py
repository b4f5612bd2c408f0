"""Scheduler and pages together: order, fairness, preemption, sharing. Contents are checked by the world's runner."""

import time

import numpy as np
import pytest
from paged_world import EOS, VOCAB, World, expected_output, next_token, request

from cabochon.engine.errors import BadPrompt, BadSampling, PromptTooLong, RequestError
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


def first_token_steps(world: World, max_steps: int = 500) -> dict[str, int]:
    """Steps until each request's first token."""
    seen: dict[str, int] = {}
    for step in range(1, max_steps):
        if world.step() is None:
            return seen
        seen |= {name: step for name, out in world.outputs.items() if out and name not in seen}
    raise AssertionError("not done")


def test_a_request_gives_the_tokens_of_the_naive_model() -> None:
    world = World()
    world.add(request("a", prompt_of(13), max_tokens=20))
    world.run()
    assert world.outputs["a"] == expected_output(prompt_of(13), 20)
    assert world.pool.num_used == 0


def test_finish_reasons() -> None:
    world = World()
    stopping = next(
        p for p in ([i, j] for i in range(2, VOCAB) for j in range(2, VOCAB)) if next_token(p) == EOS
    )
    world.add(request("stop", stopping))
    world.add(request("ignored", stopping, max_tokens=3, ignore_eos=True))
    world.run()
    assert world.outputs["stop"] == [EOS]
    assert world.reasons == {"stop": "stop", "ignored": "length"}
    assert len(world.outputs["ignored"]) == 3


def test_min_tokens_outlives_a_stop_token() -> None:
    prompt = prompt_of(5)
    stop = next_token(prompt)
    params = SamplingParams(max_tokens=5, min_tokens=1, stop_token_ids=(stop,), ignore_eos=True)
    world = World()
    world.add(GenerateRequest(request_id="a", prompt_ids=prompt, params=params))
    world.run()
    assert len(world.outputs["a"]) > 1


def test_without_max_tokens_the_context_is_filled() -> None:
    world = World(max_model_len=24)
    params = SamplingParams(ignore_eos=True)
    world.add(GenerateRequest(request_id="a", prompt_ids=prompt_of(10), params=params))
    world.run()
    assert len(world.outputs["a"]) == 14
    assert world.reasons["a"] == "length"


def test_a_long_prompt_is_cut_into_chunks_within_the_budget() -> None:
    world = World(step_tokens=8, max_model_len=80, num_pages=80)
    world.add(request("a", prompt_of(60)))
    world.run()
    assert max(plan.num_tokens for plan in world.plans) == 8


def test_a_short_prompt_does_not_wait_behind_long_ones() -> None:
    world = World(step_tokens=16, max_seqs=16, max_model_len=80, num_pages=800)
    for i in range(10):
        world.add(request(f"long{i}", prompt_of(60, seed=i)))
    world.add(request("short", prompt_of(6, seed=99)))
    steps = first_token_steps(world)
    assert steps["short"] == 1
    assert len(steps) == 11


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    world = World(step_tokens=16, max_seqs=16, max_model_len=80, num_pages=800)
    world.add(request("long", prompt_of(64)))
    for step in range(1, 12):
        for i in range(4):
            world.add(request(f"short{step}-{i}", prompt_of(6, seed=10 * step + i), max_tokens=1))
        world.step()
        if world.outputs["long"]:
            break
    assert step <= 64 / (16 / 2 - 1) + 1, "the oldest must get half of what decodes leave"


def test_smaller_priority_numbers_go_first() -> None:
    world = World(step_tokens=8, max_seqs=8, num_pages=200)
    for i, priority in enumerate([5, 0, 5, -3]):
        world.add(request(f"{i}", prompt_of(24, seed=i), priority=priority))
    steps = first_token_steps(world)
    assert sorted(steps, key=steps.__getitem__) == ["3", "1", "0", "2"]


def test_preempted_requests_give_the_same_tokens() -> None:
    world = World(num_pages=26, max_seqs=4, windows=(None, 6), max_model_len=40)
    prompts = {f"{i}": prompt_of(9 + i, seed=i) for i in range(4)}
    for name, prompt in prompts.items():
        world.add(request(name, prompt, max_tokens=25, ignore_eos=True))
    world.run()
    assert world.scheduler.stats().preemptions > 0
    for name, prompt in prompts.items():
        assert world.outputs[name] == expected_output(prompt, 25, ignore_eos=True)


def test_the_worst_ranked_is_preempted_first() -> None:
    world = World(num_pages=20, max_seqs=3, windows=(None,), max_model_len=40)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        world.add(
            request(name, prompt_of(12, seed=ord(name)), max_tokens=28, ignore_eos=True, priority=priority)
        )
    while not world.scheduler.stats().preemptions:
        world.step()
    assert [r.request_id for r in world.scheduler._waiting] == ["a"]


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
    world = World()
    prompt = prompt_of(22)
    for name, fields in (
        ("a", {}),
        ("b", {"cache_salt": "x"}),
        ("c", {"cache_salt": "y"}),
        ("d", {"adapter": "x"}),
    ):
        world.add(request(name, prompt, **fields))
        world.run()
    world.add(request("e", prompt, cache_salt="x"))
    world.run()
    assert world.cached_tokens == {"a": 0, "b": 0, "c": 0, "d": 0, "e": 20}


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


@pytest.mark.parametrize("steps", range(8))
def test_abort_frees_pages_and_row_at_once(steps: int) -> None:
    world = World(step_tokens=8)
    for name in "abcde":
        world.add(request(name, prompt_of(15, seed=ord(name)), max_tokens=30, ignore_eos=True))
    for _ in range(steps):
        world.step()
    for name in "eadcb":
        world.scheduler.abort(name)
        world.scheduler.check()
    world.scheduler.abort("unknown")
    assert not world.scheduler.has_work
    assert world.pool.num_used == 0


def test_every_request_ends_when_the_pool_holds_only_one() -> None:
    world = World(num_pages=12 + 7, max_model_len=48, step_tokens=16, windows=(None, 6))
    for i in range(6):
        world.add(request(f"{i}", prompt_of(30, seed=i), max_tokens=18, ignore_eos=True))
    world.run()
    assert len(world.reasons) == 6


@pytest.mark.parametrize(
    ("fields", "params", "error", "message"),
    [
        ({"prompt_ids": []}, {}, BadPrompt, "at least one token, got none"),
        ({"prompt_ids": [3, -1]}, {}, BadPrompt, r"token ids must be in \[0, 50\), the prompt has -1..3"),
        ({"prompt_ids": [50]}, {}, BadPrompt, r"token ids must be in \[0, 50\), the prompt has 50..50"),
        (
            {"prompt_ids": [3] * 48},
            {},
            PromptTooLong,
            "^This model's maximum context length is 48 tokens.*48 tokens",
        ),
        (
            {"prompt_ids": [3] * 40},
            {"max_tokens": 9},
            PromptTooLong,
            "has 40 tokens and 9 of output are wanted",
        ),
        (
            {},
            {"logit_bias": {50: 1.0}},
            BadSampling,
            r"logit_bias must name token ids in \[0, 50\), got 50..50",
        ),
        ({}, {"stop_token_ids": (-1,)}, BadSampling, r"stop_token_ids must name token ids in \[0, 50\)"),
        ({}, {"min_tokens": 46}, BadSampling, "min_tokens must be at most the 45 tokens"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_and_nothing_is_kept(
    fields: dict[str, object], params: dict[str, object], error: type[RequestError], message: str
) -> None:
    world = World()
    with pytest.raises(error, match=message):
        world.scheduler.add(
            GenerateRequest(
                **{"request_id": "a", "prompt_ids": [3, 4, 5], "params": SamplingParams(**params), **fields}
            )
        )
    assert not world.scheduler.has_work
    world.scheduler.check()


def test_a_running_id_is_refused() -> None:
    world = World()
    world.add(request("a", [3, 4]))
    with pytest.raises(RequestError, match="request ids must be unique, a is running: send another id"):
        world.scheduler.add(request("a", [5]))


def test_planning_a_decode_step_of_256_requests_is_fast() -> None:
    world = World(max_seqs=256, step_tokens=512, max_model_len=512, num_pages=40_000, page_tokens=16)
    for i in range(256):
        world.add(request(f"{i}", prompt_of(8 + i % 16, seed=i), max_tokens=400, ignore_eos=True))
    tokens = np.full(256, 7, np.int32)
    spent = []
    for _ in range(200):
        started_s = time.thread_time()
        plan = world.scheduler.schedule()
        assert plan is not None
        world.scheduler.update(plan, tokens[: plan.samples.sum()])
        spent.append(time.thread_time() - started_s)
    decode_ms = sorted(spent[50:])[len(spent[50:]) // 2] * 1e3
    assert decode_ms < 5, f"{decode_ms:.2f} ms"  # about 0.6 here; the benchmark has the target
