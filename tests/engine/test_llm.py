"""The offline engine end to end: greedy parity with transformers, the guarantees on sampling and batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_gemma import oracle_greedy
from tools import ran_without_amx
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

from cabochon.engine.errors import BadPrompt, ComputeError, ConfigError, PromptTooLong
from cabochon.engine.llm import LLM, Completion
from cabochon.engine.models.verify import PROMPTS
from cabochon.engine.sampling_params import SamplingParams


def tiny(directory: Path, **options: object) -> LLM:
    defaults = {"dtype": "fp32", "page_tokens": 4, "kv_cache_gib": 0.002, "max_seqs": 64, "step_tokens": 64}
    return LLM(str(directory), **{**defaults, **options})


def random_prompts(count: int, vocab: int, seed: int = 0, low: int = 1, high: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(6, vocab, rng.integers(low, high)).tolist() for _ in range(count)]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(params=["tiny_gemma2_dir", "tiny_gemma3_dir"])
def tiny_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_200_greedy_tokens_equal_transformers(tiny_dir: Path) -> None:
    llm = tiny(tiny_dir)
    prompts = random_prompts(3, llm.info.vocab_size, high=30)
    ours = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    oracle = AutoModelForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager")
    assert tokens(ours) == [oracle_greedy(oracle, prompt, 200) for prompt in prompts]


KINDS = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 10, "presence_penalty": 0.5},
    {"min_p": 0.05, "repetition_penalty": 1.2, "logit_bias": {9: 2.0}},
]


def mixed_params(count: int, max_tokens: int = 24) -> list[SamplingParams]:
    return [
        SamplingParams(seed=i, max_tokens=max_tokens, ignore_eos=True, **KINDS[i % len(KINDS)])
        for i in range(count)
    ]


def test_the_same_tokens_alone_or_among_63_others(tiny_dir: Path) -> None:
    llm = tiny(tiny_dir, prefix_caching=False)
    prompts, params = random_prompts(64, llm.info.vocab_size), mixed_params(64)
    together = tokens(llm.generate(prompts, params))
    for i in range(0, 64, 7):
        assert tokens(llm.generate([prompts[i]], params[i])) == [together[i]]


@pytest.mark.parametrize(
    "options", [{"step_tokens": 8, "max_seqs": 8}, {"step_tokens": 17, "max_seqs": 3}], ids=str
)
def test_the_same_tokens_on_any_chunking(tiny_dir: Path, options: dict[str, int]) -> None:
    prompts, params = random_prompts(10, 200), mixed_params(10)
    expected = tokens(tiny(tiny_dir, step_tokens=1024).generate(prompts, params))
    assert tokens(tiny(tiny_dir, **options).generate(prompts, params)) == expected


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
def test_the_same_tokens_on_any_page_size(tiny_dir: Path, page_tokens: int) -> None:
    prompts, params = random_prompts(6, 200), mixed_params(6)
    expected = tokens(tiny(tiny_dir).generate(prompts, params))
    assert (
        tokens(tiny(tiny_dir, page_tokens=page_tokens, kv_cache_gib=0.02).generate(prompts, params))
        == expected
    )


def test_the_same_tokens_from_the_prefix_cache(tiny_dir: Path) -> None:
    llm = tiny(tiny_dir)
    prompts, params = random_prompts(8, 200, low=20), mixed_params(8)
    first, second = llm.generate(prompts, params), llm.generate(prompts, params)
    assert tokens(first) == tokens(second)
    assert all(completion.cached_tokens >= 16 for completion in second)
    longer = [[*c.prompt_ids, *c.token_ids, 9] for c in first]  # pages written by decodes
    cached = llm.generate(longer, params)
    assert all(c.cached_tokens > len(p) for c, p in zip(cached, prompts, strict=True))
    assert tokens(cached) == tokens(tiny(tiny_dir, prefix_caching=False).generate(longer, params))


def test_the_same_tokens_after_preemption(tiny_dir: Path) -> None:
    prompts, params = random_prompts(12, 200, low=20), mixed_params(12, max_tokens=60)
    expected = tokens(tiny(tiny_dir, kv_cache_gib=0.02).generate(prompts, params))
    small = tiny(tiny_dir, max_model_len=128, kv_cache_gib=0.0002)  # 104 and 209 pages
    assert tokens(small.generate(prompts, params)) == expected
    assert small.core.stats().preemptions > 0


def test_nan_ends_one_request_with_an_error(tiny_gemma2_dir: Path) -> None:
    llm = tiny(tiny_gemma2_dir)
    embedding = llm.core._runner._model._embedding
    embedding[77] = torch.nan
    with pytest.raises(ComputeError, match="logits must be finite"):
        llm.generate([[8, 77, 9]])
    assert llm.core.stats().pages_used == 0
    assert len(llm.generate([[8, 9]], SamplingParams(temperature=0, max_tokens=5))[0].token_ids) > 0


def test_a_refused_prompt_loses_nothing(tiny_gemma2_dir: Path) -> None:
    llm = tiny(tiny_gemma2_dir)
    with pytest.raises(BadPrompt, match="at least one token"):
        llm.generate([[8, 9], []])
    with pytest.raises(PromptTooLong, match="maximum context length is 512 tokens"):
        llm.generate([[8] * 513])
    with pytest.raises(ValueError, match="one for all or one per prompt"):
        llm.generate([[8]], [])
    assert not llm.core.has_work


def test_stop_strings_end_a_completion(tiny_gemma2_dir: Path) -> None:
    llm = tiny(tiny_gemma2_dir)
    params = SamplingParams(seed=3, max_tokens=40, ignore_eos=True)
    whole = llm.generate(["hello"], params)[0].text
    stop = whole[len(whole) // 2 :][:2]
    cut = llm.generate(["hello"], params, stop=[stop])[0]
    assert cut.text == whole[: whole.find(stop)]
    assert cut.finish_reason == "stop"
    assert not llm.core.has_work


def test_a_pool_too_small_for_the_context_is_refused(tiny_gemma2_dir: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_gib must hold one sequence of max_model_len tokens"):
        tiny(tiny_gemma2_dir, max_model_len=512, kv_cache_gib=0.0001)
    assert tiny(tiny_gemma2_dir, kv_cache_gib=0.0002).info.max_model_len < 512
    with pytest.raises(ConfigError, match="max_model_len must be at most 512"):
        tiny(tiny_gemma2_dir, max_model_len=513)


def test_fp16_is_refused(tiny_gemma2_dir: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be auto, bf16 or fp32, got fp16: Gemma overflows"):
        tiny(tiny_gemma2_dir, dtype="fp16")


def test_the_demo_continues_a_sentence(demo_dir: Path) -> None:
    llm = LLM("demo", dtype="bf16", kv_cache_gib=0.2)
    answer = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))[0]
    assert "France" in answer.text or "Paris" in answer.text
    assert llm.info.num_groups == 6


@pytest.mark.slow
def test_the_demos_greedy_text_equals_transformers_in_fp32(demo_dir: Path) -> None:
    llm = LLM("demo", dtype="fp32", kv_cache_gib=0.2)
    ours = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    oracle = Gemma3ForCausalLM.from_pretrained(demo_dir, dtype=torch.float32, attn_implementation="eager")
    oracle.generation_config.eos_token_id = None
    for completion in ours:
        ids = torch.tensor([completion.prompt_ids])
        out = oracle.generate(ids, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(ids))
        assert completion.token_ids == out[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_the_demo_in_bf16_gives_the_same_tokens_alone_or_among_others(
    demo_dir: Path, request: pytest.FixtureRequest
) -> None:
    if ran_without_amx(request):
        return
    llm = LLM("demo", dtype="bf16", kv_cache_gib=0.5, prefix_caching=False, step_tokens=4096)
    params = [
        SamplingParams(seed=i, temperature=(i % 2) * 0.8, max_tokens=24, ignore_eos=True) for i in range(16)
    ]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    together = tokens(llm.generate(prompts, params))
    for i in range(0, 16, 3):
        assert tokens(llm.generate([prompts[i]], params[i])) == [together[i]]
