"""Sandwich norm against two norms and an addition in torch."""

import pytest
import torch
from guarded import far_apart, guarded, noise, poisoned, surroundings_are_untouched

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.sandwich_norm import sandwich_norm, sandwich_norm_reference

EPS = 1e-6


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("E", [1, 33, 640, 2304, 3584, 4608])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matches_the_definition(T: int, E: int, dtype: torch.dtype) -> None:
    branch, residual = guarded(noise(T, E).to(dtype)), guarded(noise(T, E, seed=1).to(dtype), pad=3)
    post, pre = 1 + noise(E, seed=2), 1 + noise(E, seed=3)
    residual_out, x_out = poisoned(T, E, dtype=dtype), poisoned(T, E, dtype=dtype)
    sandwich_norm(branch, residual, post, pre, EPS, residual_out=residual_out, x_out=x_out)
    if T:
        low = sandwich_norm_reference(branch, residual, post, pre, EPS)
        truth = sandwich_norm_reference(branch.double(), residual.double(), post.double(), pre.double(), EPS)
        assert_within_budget(residual_out, low[0], truth[0])
        assert_within_budget(x_out, low[1], truth[1])
    assert surroundings_are_untouched(residual_out)
    assert surroundings_are_untouched(x_out)


def test_every_rounding_is_the_definitions() -> None:
    """In bf16 a sum that skips a rounding differs in the last bit of some elements."""
    branch, residual = noise(50, 640).bfloat16(), noise(50, 640, seed=1).bfloat16()
    post, pre = 1 + noise(640, seed=2), 1 + noise(640, seed=3)
    residual_out, x_out = torch.empty_like(branch), torch.empty_like(branch)
    sandwich_norm(branch, residual, post, pre, EPS, residual_out=residual_out, x_out=x_out)
    expected, expected_x = sandwich_norm_reference(branch, residual, post, pre, EPS)
    assert (residual_out != expected).float().mean() < 1e-3  # fp32 sums in another order may round apart
    assert (x_out != expected_x).float().mean() < 1e-3


def test_outputs_may_be_inputs() -> None:
    branch, residual, post = noise(3, 64), noise(3, 64, seed=1), 1 + noise(64, seed=2)
    expected = torch.empty_like(branch), torch.empty_like(branch)
    sandwich_norm(branch, residual, post, post, EPS, residual_out=expected[0], x_out=expected[1])
    sandwich_norm(branch, residual, post, post, EPS, residual_out=residual, x_out=branch)
    assert torch.equal(residual, expected[0])
    assert torch.equal(branch, expected[1])


def test_after_the_last_layer_only_the_residual_is_written() -> None:
    branch, residual, post = noise(3, 64), noise(3, 64, seed=1), 1 + noise(64, seed=2)
    before = branch.clone()
    expected, _ = sandwich_norm_reference(branch, residual, post, post, EPS)
    sandwich_norm(branch, residual, post, None, EPS, residual_out=residual, x_out=None)
    torch.testing.assert_close(residual, expected)
    assert torch.equal(branch, before)


def test_a_row_is_bitwise_the_same_in_any_batch() -> None:
    branch, residual, post = noise(9, 640), noise(9, 640, seed=1), 1 + noise(640, seed=2)
    whole, alone = torch.empty(2, 9, 640), torch.empty(2, 1, 640)
    sandwich_norm(branch, residual, post, post, EPS, residual_out=whole[0], x_out=whole[1])
    sandwich_norm(branch[5:6], residual[5:6], post, post, EPS, residual_out=alone[0], x_out=alone[1])
    assert torch.equal(alone[:, 0], whole[:, 5])


def test_row_offsets_pass_2_to_the_31() -> None:
    branch, residual, total, x = (far_apart(3, 64, torch.bfloat16) for _ in range(4))
    branch.copy_(noise(3, 64))
    residual.copy_(noise(3, 64, seed=1))
    sandwich_norm(branch, residual, torch.ones(64), torch.ones(64), EPS, residual_out=total, x_out=x)
    expected = sandwich_norm_reference(branch.clone(), residual.clone(), torch.ones(64), torch.ones(64), EPS)
    torch.testing.assert_close((total.clone(), x.clone()), expected)


def test_half_a_second_norm_is_refused() -> None:
    x = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="pre_weight and x_out go together: give both or neither"):
        sandwich_norm(x, x, torch.ones(8), None, EPS, residual_out=x, x_out=x)
