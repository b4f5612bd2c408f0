"""How wrong a kernel may be: at most twice as wrong as the same math in the working precision."""

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, low: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """Compare `actual` with `truth` (fp64); `low` is the same math in torch at the working precision.

    Raises AssertionError with both numbers; values that are not finite never pass.
    """
    assert actual.shape == low.shape == truth.shape, f"shapes {actual.shape}, {low.shape}, {truth.shape}"
    assert torch.isfinite(low).all(), "the low-precision result is not finite"
    assert torch.isfinite(truth).all(), "the truth is not finite"
    truth = truth.double()
    assert torch.isfinite(actual).all(), "values are not finite"
    budget = factor * (low.double() - truth).abs().max() + torch.finfo(actual.dtype).eps * truth.abs().max()
    error = (actual.double() - truth).abs().max()
    assert error <= budget, f"error {error:.2e} over budget {budget:.2e}"
