"""The engine on an NVIDIA GPU beside transformers on the same GPU: fp32 with TF32 off."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_gemma import oracle_greedy
from transformers import AutoModelForCausalLM

from cabochon.engine.llm import LLM
from cabochon.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def engine(directory: Path, **options: object) -> LLM:
    defaults = {"device": "cuda", "dtype": "fp32", "kv_cache_gib": 0.1, "max_seqs": 8, "step_tokens": 64}
    return LLM(str(directory), **{**defaults, **options})


def prompts_for(llm: LLM) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(6, llm.info.vocab_size, n).tolist() for n in (1, 7, 30, 90)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_64_greedy_tokens_equal_transformers(
    request: pytest.FixtureRequest, model: str, backend: str
) -> None:
    directory = request.getfixturevalue(model)
    llm = engine(directory, attention_backend=backend)
    assert (llm.info.device, llm.info.attention_backend) == ("cuda", backend)
    prompts = prompts_for(llm)
    ours = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    oracle = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert [one.token_ids for one in ours] == [oracle_greedy(oracle, prompt, 64) for prompt in prompts]


def test_fp8_pages_give_nearly_the_logits_of_fp32_pages(tiny_gemma3_dir: Path) -> None:
    exact, ours = (engine(tiny_gemma3_dir, kv_dtype=kv_dtype) for kv_dtype in ("auto", "fp8"))
    for prompt in prompts_for(exact):
        truth = exact.core.prompt_logits(prompt)
        error = (ours.core.prompt_logits(prompt) - truth).square().mean().sqrt()
        assert error < 0.1 * truth.square().mean().sqrt()  # 0.034 to 0.052 by the torch definition


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"top_p": 0.9, "presence_penalty": 0.5}, {"top_k": 5}]
)
def test_sampled_tokens_are_those_of_the_cpu(tiny_gemma2_dir: Path, params: dict[str, float]) -> None:
    sampling = SamplingParams(seed=3, max_tokens=32, ignore_eos=True, **params)  # type: ignore[arg-type]
    on_gpu, on_cpu = engine(tiny_gemma2_dir), engine(tiny_gemma2_dir, device="cpu")
    prompts = prompts_for(on_cpu)
    got, expected = ([one.token_ids for one in llm.generate(prompts, sampling)] for llm in (on_gpu, on_cpu))
    same = sum(
        a == b for one, other in zip(got, expected, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert same >= 0.9 * 32 * len(prompts), "rounding may turn a near tie, not more"


def test_the_pool_is_sized_from_what_a_real_step_leaves(tiny_gemma2_dir: Path) -> None:
    llm = engine(tiny_gemma2_dir, kv_cache_gib=None, gpu_memory_utilization=0.1, max_model_len=512)
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0 < llm.info.kv_bytes < 0.1 * total
    assert llm.generate([[5, 6, 7]])[0].token_ids
