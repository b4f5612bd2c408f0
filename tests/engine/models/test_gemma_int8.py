"""Gemma with int8 weights: near the unquantized one; with the head alone in int8, its greedy tokens."""

import pytest
import torch
from forward import Forward
from random_gemma import model_config, random_gemma2, random_gemma3
from tools import absent

from cabochon.engine.int8_linear import Int8Head, Int8Linear
from cabochon.engine.llm import LLM
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.native.library import library


@pytest.fixture(autouse=True)
def _library() -> None:
    if library() is None:
        absent("no C library for this CPU: it is built by pip install, with a C compiler")


IDS = list(range(5, 45))
PROMPTS = [IDS[:n] for n in (1, 4, 9, 30)]
CPU = {"kv_cache_gib": 0.02, "threads": 1, "max_seqs": 8}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
INT8 = {"make_linear": Int8Linear, "make_head": Int8Head}


def forward_for(hf: torch.nn.Module, **options: object) -> Forward:
    return Forward(model_config(hf.config), dict(hf.state_dict()), **options)


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
def test_logits_are_near_those_of_the_unquantized_model(make: type) -> None:
    hf = make(qk_gain=1.0)
    plain, quantized = forward_for(hf), forward_for(hf, **INT8)
    expected, logits = (one.step([(one.add(IDS), len(IDS))])[0] for one in (plain, quantized))
    error = (logits - expected).norm() / expected.norm()
    assert 0.002 < error < 0.05  # random weights: each of four layers and the head adds its 0.8 %


def test_int8_logits_are_bitwise_the_same_on_any_chunking_and_batch() -> None:
    alone, ours = (forward_for(random_gemma2(), **INT8) for _ in range(2))
    expected = alone.step([(alone.add(IDS), len(IDS))])[0]
    row, other = ours.add(IDS), ours.add(IDS[::-1])
    got = [ours.step([(other, 3), (row, n)])[1] for n in (7, 1, 20, 12)]
    assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_an_engine_with_int8_weights_gives_the_same_tokens_alone_or_not(
    request: pytest.FixtureRequest, model: str, dtype: str
) -> None:
    llm = LLM(str(request.getfixturevalue(model)), dtype=dtype, quantization="int8", **CPU)
    together = [one.token_ids for one in llm.generate(PROMPTS, GREEDY)]
    assert [len(tokens) for tokens in together] == [16] * 4
    assert [llm.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS] == together


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_greedy_tokens_are_those_of_the_unquantized_head(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str, dtype: str
) -> None:
    directory = str(request.getfixturevalue(model))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=3)
    plain = LLM(directory, dtype=dtype, **CPU).generate(PROMPTS, params)
    monkeypatch.setattr("cabochon.engine.settle.head_of", lambda _: Int8Head)
    heads = []
    head_type = Gemma.head
    monkeypatch.setattr(Gemma, "head", lambda self, x: heads.append(type(self._head)) or head_type(self, x))
    ours = LLM(directory, dtype=dtype, **CPU).generate(PROMPTS, params)
    assert set(heads) == {Int8Head}
    assert [one.token_ids for one in ours] == [one.token_ids for one in plain]
    chosen = [[entry.logprob for entry in one.logprobs] for one in (*ours, *plain)]
    assert torch.allclose(torch.tensor(chosen[:4]), torch.tensor(chosen[4:]), atol=0.02)
