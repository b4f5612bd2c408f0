"""What `Forward` refuses. What it computes: tests/engine/models/test_native_forward.py, on whole models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cabochon.kernels.native.forward import Forward, LayerTensors, Sizes, Weight
from cabochon.kernels.native.quantize import quantize_weight

E, F, HEADS, KV_HEADS, D, PAGES = 32, 48, 4, 2, 16, 5
SIZES = Sizes(
    hidden=E, mlp=F, heads=HEADS, kv_heads=KV_HEADS, head_dim=D, eps=1e-6, attention_scale=0.25, softcap=None
)
pytestmark = pytest.mark.usefixtures("build")

IDS = torch.zeros(1, dtype=torch.int64)
LENGTHS = torch.tensor([0, 1], dtype=torch.int32)


def weight(n: int, k: int) -> Weight:
    return Weight(*quantize_weight(torch.randn(n, k)))


def layer(**changes: Any) -> LayerTensors:
    tensors = LayerTensors(
        norms=(torch.ones(E), torch.ones(E), torch.ones(E), torch.ones(E)),
        head_norms=None,
        weights=(
            weight((HEADS + 2 * KV_HEADS) * D, E),
            weight(E, HEADS * D),
            weight(2 * F, E),
            weight(E, F),
        ),
        angles=(torch.ones(9, D // 2), torch.zeros(9, D // 2)),
        pages=(torch.zeros(PAGES, 4, KV_HEADS, D), torch.zeros(PAGES, 4, KV_HEADS, D)),
        group=0,
        window=None,
    )
    return tensors._replace(**changes)


def step(forward: Forward, **changes: Any) -> Tensor:
    inputs = {
        "token_ids": IDS, "positions": IDS, "slots": [IDS + 4],
        "page_tables": [torch.ones((1, 1), dtype=torch.int32)],
        "cu_seqlens_q": LENGTHS, "seq_lens": LENGTHS[1:],
    }  # fmt: skip
    return forward(**inputs | changes)


def test_it_runs() -> None:
    layers = [layer(), layer()]
    hidden = step(Forward(torch.randn(3, E), 2.0, SIZES, layers))
    assert hidden.shape == (1, E)
    assert hidden.isfinite().all()
    assert layers[1].pages[0].any(), "K is written"


@pytest.mark.parametrize(
    "changes",
    [
        {"norms": (torch.ones(E), torch.ones(E), torch.ones(E + 16), torch.ones(E))},
        {"head_norms": (torch.ones(D), torch.ones(D).double())},
        {"weights": layer().weights[::-1]},
        {"weights": tuple(Weight(values, None) for values, _ in layer().weights)},
        {"weights": tuple(Weight(values, torch.ones(1)) for values, _ in layer().weights)},
        {"angles": (torch.ones(9, D), torch.zeros(9, D))},
        {"angles": (torch.ones(9, D)[:, ::2], torch.ones(9, D)[:, ::2])},
        {"angles": (torch.ones(9, D // 2), torch.zeros(9, D // 2).double())},
        {"weights": tuple(Weight(values.T.contiguous().T, scales) for values, scales in layer().weights)},
        {"pages": (torch.zeros(PAGES, 4, KV_HEADS, D), torch.zeros(PAGES, 8, KV_HEADS, D))},
        {"pages": (torch.zeros(PAGES, 4, 1, D), torch.zeros(PAGES, 4, 1, D))},
        {"pages": (torch.zeros(PAGES, 4, KV_HEADS, D).bfloat16(),) * 2},
        {"pages": (torch.zeros(PAGES, 8, KV_HEADS, D),) * 2},  # fits, but not the other layer's
        {"group": -1},
    ],
)
def test_a_layer_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Forward(torch.randn(3, E), 2.0, SIZES, [layer(), layer(**changes)])


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"hidden": 48}, {"head_dim": 24}, {"mlp": 40}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        Forward(torch.randn(3, E), 2.0, replace(SIZES, **sizes), [layer()])


def test_want_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Forward(torch.randn(3, E), 2.0, SIZES, [layer()])
    monkeypatch.setattr("cabochon.kernels.native.forward.function", lambda *_: lambda *_: -1)
    with pytest.raises(MemoryError, match="a step of 1 tokens"):
        step(forward)


@pytest.mark.parametrize(
    "changes",
    [
        {"page_tables": []},
        {"token_ids": IDS.int()},
        {"positions": torch.zeros(2, dtype=torch.int64)},
        {"slots": [IDS, IDS]},
        {"slots": [torch.zeros(2, dtype=torch.int64)]},
        {"page_tables": [torch.ones((2, 1), dtype=torch.int32)]},
        {"cu_seqlens_q": LENGTHS[1:]},
        {"seq_lens": LENGTHS[1:].long()},
        {"token_ids": IDS[:0], "positions": IDS[:0], "slots": [IDS[:0]]},
    ],
)
def test_a_step_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    forward = Forward(torch.randn(3, E), 2.0, SIZES, [layer()])
    with pytest.raises(ValueError, match="must"):
        step(forward, **changes)
