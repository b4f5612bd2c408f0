"""RMSNorm against the torch definition in fp64."""

import pytest
import torch
from guarded import far_apart, guarded, noise, poisoned, surroundings_are_untouched

from cabochon.kernels import definitions
from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.rms_norm import rms_norm

EPS = 1e-6


@pytest.mark.parametrize(("T", "E"), [(0, 8), (1, 1), (3, 127), (5, 256), (2, 640), (1, 2304), (7, 3584)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matches_the_definition(T: int, E: int, dtype: torch.dtype) -> None:
    x, weight = guarded(noise(T, E).to(dtype)), 1 + noise(E, seed=1)
    out = poisoned(T, E, dtype=dtype)
    rms_norm(x, weight, EPS, out=out)
    if T:
        truth = definitions.rms_norm(x.double(), weight.double(), EPS)
        assert_within_budget(out, definitions.rms_norm(x, weight, EPS), truth)
    assert surroundings_are_untouched(out)


def test_eps_stands_inside_the_root() -> None:
    x, out = torch.full((1, 4), 1e-3), torch.empty(1, 4)
    rms_norm(x, torch.ones(4), 1e-6, out=out)
    torch.testing.assert_close(out, torch.full((1, 4), 0.5**0.5))


def test_the_output_may_be_the_input() -> None:
    x, weight = noise(3, 640), 1 + noise(640, seed=1)
    expected = torch.empty_like(x)
    rms_norm(x, weight, EPS, out=expected)
    rms_norm(x, weight, EPS, out=x)
    assert torch.equal(x, expected)


def test_a_row_is_bitwise_the_same_in_any_batch() -> None:
    x, weight = noise(9, 640), 1 + noise(640, seed=1)
    whole, alone = torch.empty_like(x), torch.empty(1, 640)
    rms_norm(x, weight, EPS, out=whole)
    rms_norm(x[5:6], weight, EPS, out=alone)
    assert torch.equal(alone[0], whole[5])


def test_row_offsets_pass_2_to_the_31() -> None:
    x, out, weight = far_apart(3, 64, torch.bfloat16), far_apart(3, 64, torch.bfloat16), torch.ones(64)
    x.copy_(noise(3, 64))
    rms_norm(x, weight, EPS, out=out)
    torch.testing.assert_close(out.clone(), definitions.rms_norm(x.clone(), weight, EPS))


def test_shapes_that_disagree_are_told() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must be a contiguous \[8\] fp32, got \[7\] torch.float32"):
        rms_norm(x, torch.zeros(7), EPS, out=x)
    with pytest.raises(ValueError, match=r"rows must be \[T, E\] = \[2, 8\], got \[1, 8\]"):
        rms_norm(x, torch.zeros(8), EPS, out=torch.zeros(1, 8))
    with pytest.raises(ValueError, match="rows must be contiguous, at most 8192 long"):
        rms_norm(x.t(), torch.zeros(2), EPS, out=x.t())
