"""Log probabilities against transformers' fp32 log-softmax of capped logits, on every path."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_gemma import oracle_logits
from transformers import AutoModelForCausalLM

from cabochon.engine.llm import LLM, Completion
from cabochon.engine.logprobs import token_logprobs
from cabochon.engine.sampling_params import SamplingParams

ATOL = 2e-4  # two fp32 forward passes with sums in other orders: 1.2e-4 at most was seen
PARAMS = SamplingParams(seed=3, max_tokens=30, ignore_eos=True, logprobs=20, prompt_logprobs=20)


def tiny(directory: Path, **options: object) -> LLM:
    defaults = {"dtype": "fp32", "page_tokens": 4, "kv_cache_gib": 0.002, "max_seqs": 8, "step_tokens": 16}
    return LLM(str(directory), **{**defaults, **options})


def random_prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(6, 200, length).tolist() for length in rng.integers(1, 60, count)]


def assert_equal_transformers(directory: Path, completions: list[Completion]) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    for one in completions:
        ids = one.prompt_ids + one.token_ids
        truth = oracle_logits(oracle, ids).double().log_softmax(-1)  # [n, V], of the next token
        assert len(one.prompt_logprobs) == len(one.prompt_ids) - 1
        assert len(one.logprobs) == len(one.token_ids)
        for position, got in enumerate([*one.prompt_logprobs, *one.logprobs]):
            assert got.logprob == pytest.approx(float(truth[position, ids[position + 1]]), abs=ATOL)
            values, top_ids = truth[position].topk(20)
            np.testing.assert_allclose(got.top_logprobs, values.numpy(), atol=ATOL)
            swapped = [i for i in range(20) if got.top_ids[i] != int(top_ids[i])]
            assert all(values[i] - values[i + 1 : i + 2].sum() < ATOL or i - 1 in swapped for i in swapped)


@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_prompt_and_output_equal_transformers(model: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(model)
    assert_equal_transformers(directory, tiny(directory).generate(random_prompts(6), PARAMS))


def test_they_are_the_same_after_preemption_and_beside_a_cached_prefix(tiny_gemma2_dir: Path) -> None:
    small = tiny(tiny_gemma2_dir, max_model_len=100, kv_cache_gib=0.0002)
    prompts = random_prompts(8)
    first, second = small.generate(prompts, PARAMS), small.generate(prompts, PARAMS)
    assert small.core.stats().preemptions > 0
    assert first == second
    assert_equal_transformers(tiny_gemma2_dir, first)


def test_who_asks_for_fewer_gets_fewer_and_who_does_not_ask_gets_none(tiny_gemma2_dir: Path) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=count) for count in (None, 0, 3)
    ]
    none, zero, three = tiny(tiny_gemma2_dir).generate([[9, 8]] * 3, params)
    assert none.logprobs == [] == none.prompt_logprobs
    assert [one.top_ids for one in zero.logprobs] == [[], []]
    assert [len(one.top_ids) for one in three.logprobs] == [3, 3]
    assert three.logprobs[0].top_ids[0] == three.token_ids[0] == zero.token_ids[0]
    assert [one.logprob for one in zero.logprobs] == [one.logprob for one in three.logprobs]


def test_bias_penalties_and_temperature_do_not_enter(tiny_gemma2_dir: Path) -> None:
    llm = tiny(tiny_gemma2_dir)
    plain = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    bent = SamplingParams(
        temperature=0.1, seed=1, max_tokens=1, logprobs=5, logit_bias={9: 50.0}, presence_penalty=2
    )
    first, second = llm.generate([[8, 9, 7]] * 2, [plain, bent])
    assert first.logprobs[0].top_logprobs == second.logprobs[0].top_logprobs


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_rounded_logits_are_reported_exactly(softcap: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 5000, generator=g) * 4
    chosen = torch.tensor([0, 17, 4999])
    capped = truth.double() if softcap is None else softcap * (truth.double() / softcap).tanh()
    expected = capped.log_softmax(-1)
    rounded = truth.bfloat16().float()
    found = token_logprobs(rounded, chosen, 5, softcap, lambda rows, ids: truth[rows, ids]).rows()
    for row, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[row, chosen[row]]), abs=2e-3)
        assert one.top_ids == expected[row].topk(5).indices.tolist()
        np.testing.assert_allclose(one.top_logprobs, expected[row].topk(5).values, atol=2e-3)


def test_equal_tokens_are_ordered_by_id() -> None:
    logits = torch.zeros(1, 300)
    logits[0, [250, 9, 100]] = 2.0
    (one,) = token_logprobs(logits, torch.tensor([100]), 3, None, None).rows()
    assert one.top_ids == [9, 100, 250]
