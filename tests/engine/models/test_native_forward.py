"""All layers in one call of C: bit for bit what the single calls give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tools import absent
from torch import Tensor
from torch.nn.functional import pad

from cabochon.engine.llm import LLM
from cabochon.engine.models.fused import FusedGemma
from cabochon.engine.models.native_gemma import NativeGemma
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
    hidden, steps = NativeGemma.hidden, []
    ran = []
    call = Forward.__call__
    monkeypatch.setattr(Forward, "__call__", lambda self, *args: ran.append(1) or call(self, *args))

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


def test_adapters_and_other_products_take_the_single_calls(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forward, "__call__", lambda *_: pytest.fail("one call"))
    llm = LLM(str(tiny_gemma2_dir), dtype="fp32", kv_cache_gib=0.02, threads=1)
    assert len(llm.generate(PROMPTS, PARAMS)) == len(PROMPTS)
