"""All layers in one call of C: bit for bit what the single calls give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_maker import make_adapter
from random_gemma import random_gemma2
from tiny_tokenizer import tiny_tokenizer
from tools import absent
from torch import Tensor
from torch.nn.functional import pad

from cabochon.engine.kv_pages import KVPages
from cabochon.engine.llm import LLM
from cabochon.engine.models.fused import FusedGemma
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.native_gemma import NativeGemma
from cabochon.engine.native_attention import NativeAttention
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.native.forward import Forward
from cabochon.kernels.native.library import library
from cabochon.kernels.native.linear import can_multiply

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5 + i, 9, *range(20, 20 + 7 * i)] for i in range(5)]


@pytest.fixture(autouse=True)
def _library() -> None:
    if library() is None:
        absent("no C library for this CPU: it is built by pip install, with a C compiler")


@pytest.mark.parametrize(("dtype", "quantization"), [("bf16", "none"), ("bf16", "int8"), ("fp32", "int8")])
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_all_layers_in_one_call_are_the_single_calls(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    dtype: Any,
    quantization: Any,
) -> None:
    if quantization == "none" and not can_multiply():
        pytest.skip("oneDNN multiplies on this CPU")
    directory = str(request.getfixturevalue(model))
    llm = LLM(
        directory,
        dtype=dtype,
        quantization=quantization,
        kv_cache_gib=0.02,
        threads=2,
        max_seqs=8,
        step_tokens=32,
    )
    steps = compared(monkeypatch)
    llm.generate(PROMPTS, PARAMS)
    assert len(steps) > 12
    assert max(steps) > 16 > min(steps), "not only prefills, not only decodes"


def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every step by single calls, then by one, padded by two rows too. Returns their token counts."""
    hidden, ran = NativeGemma.hidden, calls(monkeypatch)
    steps: list[int] = []

    def both(self: NativeGemma, token_ids: Tensor, *rest: Any) -> Tensor:
        found = hidden(self, pad(token_ids, (0, 2)), *rest)  # first: else K and V would be there already
        assert len(ran) == len(steps) + 1, "not in one call"
        pages = rest[1]._pages.k + rest[1]._pages.v
        written = [part.clone() for part in pages]
        assert torch.equal(found[:-2], FusedGemma.hidden(self, token_ids, *rest))
        assert found.isfinite().all()
        for part, ours in zip(pages, written, strict=True):
            assert torch.equal(part, ours)
        steps.append(len(token_ids))
        return found[:-2]

    monkeypatch.setattr(NativeGemma, "hidden", both)
    return steps


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 80, "intermediate_size": 336},  # neither is a multiple of 32, the second much larger
        {"num_attention_heads": 16, "intermediate_size": 16},  # all heads together are the widest row
    ],
)
def test_every_buffer_is_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    """One that is not runs into its neighbour, or out of the memory."""
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    random_gemma2(vocab_size=tokenizer.get_vocab_size(), **sizes).save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), dtype="bf16", quantization="int8", kv_cache_gib=0.02, threads=2)
    steps = compared(monkeypatch)
    llm.generate([list(range(6, 106))] * 3, PARAMS)
    assert max(steps) == 100


def test_pages_are_those_of_the_attention_that_is_given(tiny_gemma2_dir: Path) -> None:
    llm = int8(tiny_gemma2_dir)
    expected = [one.token_ids for one in llm.generate(PROMPTS, PARAMS)]
    runner: Any = llm.core._runner
    old = runner._attention._pages
    before = [part.clone() for part in old.k]
    new = KVPages(runner._attention._model, old.layout, len(old.k[0]) - 1, old.k[0].dtype, old.k[0].device)
    runner._attention = NativeAttention(runner._attention._model, new)
    llm.core._cache._hasher = None  # what the old pages hold is not here
    assert [one.token_ids for one in llm.generate(PROMPTS, PARAMS)] == expected
    assert all(torch.equal(part, copy) for part, copy in zip(old.k, before, strict=True))


def test_steps_with_an_adapter_take_the_single_calls(
    tiny_gemma2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "first", load_model_config(tiny_gemma2_dir), 8, seed=1, std=0.5)
    llm = int8(tiny_gemma2_dir, lora_modules=(f"first={tmp_path}/first",))
    ran = calls(monkeypatch)
    names = ["first", None, "first", None, "first"]
    base = [one.token_ids for one in llm.generate(PROMPTS, PARAMS)]
    assert ran, "without an adapter: one call"
    ran.clear()
    found = [one.token_ids for one in llm.generate(PROMPTS, PARAMS, adapter=names)]
    assert not ran
    assert [tokens == other for tokens, other in zip(found, base, strict=True)] == [
        name is None for name in names
    ]
    monkeypatch.setattr(NativeGemma, "hidden", FusedGemma.hidden)
    assert [one.token_ids for one in llm.generate(PROMPTS, PARAMS, adapter=names)] == found


def test_products_that_are_not_cs_take_the_single_calls(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = calls(monkeypatch)
    llm = LLM(str(tiny_gemma2_dir), dtype="fp32", kv_cache_gib=0.02, threads=1)
    assert len(llm.generate(PROMPTS, PARAMS)) == len(PROMPTS)
    assert not ran


def int8(directory: Path, **options: Any) -> LLM:
    return LLM(str(directory), dtype="fp32", quantization="int8", kv_cache_gib=0.02, threads=1, **options)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step that is one call, from now on."""
    ran: list[int] = []
    call = Forward.__call__

    def counted(self: Forward, token_ids: Tensor, *rest: Any) -> Tensor:
        ran.append(len(token_ids))
        return call(self, token_ids, *rest)

    monkeypatch.setattr(Forward, "__call__", counted)
    return ran
