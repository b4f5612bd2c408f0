"""Embedding, scale and norm against the torch definition."""

import pytest
import torch
from guarded import far_apart, guarded, noise, poisoned, surroundings_are_untouched

from cabochon.kernels.embed_norm import embed_norm, embed_norm_reference
from cabochon.kernels.error_budget import assert_within_budget

EPS = 1e-6


def scale_of(E: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(E**0.5, dtype=dtype))


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("E", [1, 640, 2304, 3584, 4608])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matches_the_definition(T: int, E: int, dtype: torch.dtype) -> None:
    embedding, weight = guarded(noise(11, E, gain=0.05).to(dtype)), 1 + noise(E, seed=1)
    ids = torch.tensor([10, 0, 3, 3, 9, 1, 10])[:T]
    residual, x = poisoned(T, E, dtype=dtype), poisoned(T, E, dtype=dtype)
    scale = scale_of(E, dtype)
    embed_norm(ids, embedding, scale, weight, EPS, residual_out=residual, x_out=x)
    if T:
        low = embed_norm_reference(ids, embedding, scale, weight, EPS)
        truth = embed_norm_reference(ids, embedding.double(), scale, weight.double(), EPS)
        assert torch.equal(residual, low[0])  # one product, one rounding
        assert_within_budget(x, low[1], truth[1])
    assert surroundings_are_untouched(residual)
    assert surroundings_are_untouched(x)


def test_the_norm_is_that_of_the_rounded_row() -> None:
    embedding, ids = noise(20, 3584).bfloat16(), torch.arange(20)
    residual, x = torch.empty_like(embedding), torch.empty_like(embedding)
    embed_norm(ids, embedding, 59.75, torch.ones(3584), EPS, residual_out=residual, x_out=x)
    _, expected = embed_norm_reference(ids, embedding, 59.75, torch.ones(3584), EPS)
    assert (x != expected).float().mean() < 1e-3  # fp32 sums in another order may round apart


def test_the_scale_of_9b_is_59_75_in_bf16() -> None:
    embedding = torch.ones(1, 3584, dtype=torch.bfloat16)
    residual = torch.empty_like(embedding)
    scale = scale_of(3584, torch.bfloat16)
    embed_norm(
        torch.zeros(1, dtype=torch.int64), embedding, scale, torch.ones(3584), EPS,
        residual_out=residual, x_out=torch.empty_like(residual),
    )  # fmt: skip
    assert set(residual.flatten().tolist()) == {59.75}


def test_row_offsets_pass_2_to_the_31() -> None:
    embedding, residual, x = (far_apart(3, 64, torch.bfloat16) for _ in range(3))
    embedding.copy_(noise(3, 64))
    ids = torch.tensor([0, 1, 2], dtype=torch.int32)
    embed_norm(ids, embedding, 8.0, torch.ones(64), EPS, residual_out=residual, x_out=x)
    expected = embed_norm_reference(ids, embedding.clone(), 8.0, torch.ones(64), EPS)
    torch.testing.assert_close((residual.clone(), x.clone()), expected)


def test_shapes_that_disagree_are_told() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"token_ids must be \[2\] and embedding \[V, 8\]"):
        embed_norm(
            torch.zeros(3, dtype=torch.int64), torch.zeros(5, 8), 1.0, torch.ones(8), EPS,
            residual_out=x, x_out=x,
        )  # fmt: skip
