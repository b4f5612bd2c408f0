"""Which product a weight gets, and that the engine's are the same by either, but for rounding."""

import weakref

import pytest
import torch
from torch import Tensor

from cabochon.engine import native_linear as module
from cabochon.engine.linear import Linear
from cabochon.engine.llm import LLM
from cabochon.engine.native_linear import NativeLinear, native_linear
from cabochon.kernels.native.linear import can_multiply


@pytest.fixture
def _bf16() -> None:
    if not can_multiply():
        pytest.skip("a CPU without AVX512_BF16, or with AMX, leaves products to oneDNN")


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.usefixtures("_bf16")
def test_a_product_in_c_where_it_can_be_and_the_plain_weight_goes() -> None:
    weight = random(64, 48)
    kept, storage = weight.clone(), weakref.ref(weight)
    linear = native_linear(weight)
    del weight
    assert isinstance(linear, NativeLinear)
    assert storage() is None, "the plain weight is kept beside the packed one"
    assert (linear.out_features, linear.in_features, linear.num_bytes) == (64, 48, 64 * 48 * 2)
    x = random(5, 96, seed=1)[:, ::2]
    torch.testing.assert_close(linear(x), x @ kept.T)
    rows = random(5, 48, seed=2)
    assert torch.equal(linear.exact(x, rows), Linear(kept).exact(x, rows))


@pytest.mark.parametrize("weight", [random(64, 48).float(), random(60, 48), random(64, 40)])
def test_other_weights_are_onednns(weight: Tensor) -> None:
    assert isinstance(native_linear(weight), Linear)


def test_without_the_instruction_all_are_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "can_multiply", lambda: False)
    assert isinstance(native_linear(random(64, 48)), Linear)


def test_amx_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not can_multiply()


@pytest.mark.usefixtures("_bf16")
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_logits_are_those_of_onednn_but_for_rounding(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    directory = str(request.getfixturevalue(model))
    ours = LLM(directory, dtype="bf16", kv_cache_gib=0.02, threads=1)
    monkeypatch.setattr("cabochon.engine.settle.native_linear", Linear)
    theirs = LLM(directory, dtype="bf16", kv_cache_gib=0.02, threads=1)
    found, expected = (_logits(llm) for llm in (ours, theirs))
    assert not torch.equal(found, torch.zeros_like(found))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def _logits(llm: LLM) -> Tensor:
    model = llm.core._runner._model  # type: ignore[attr-defined]
    return torch.stack([model.logits(random(4, model.config.hidden_size, seed))[0] for seed in range(3)])
