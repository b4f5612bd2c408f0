"""GeGLU against the torch definition in fp64."""

import pytest
import torch
from guarded import far_apart, guarded, noise, poisoned, surroundings_are_untouched

from cabochon.kernels import definitions
from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.geglu import BLOCK_F, geglu

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # exp gives inf, and x / inf is right


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("F", [1, 96, BLOCK_F - 1, BLOCK_F, BLOCK_F + 1, 2304])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matches_the_definition(T: int, F: int, dtype: torch.dtype) -> None:
    gate_up, out = guarded(noise(T, 2 * F).to(dtype)), poisoned(T, F, dtype=dtype)
    geglu(gate_up, out=out)
    if T:
        assert_within_budget(out, definitions.geglu(gate_up), definitions.geglu(gate_up.double()))
    assert surroundings_are_untouched(out)


def test_gelu_is_rounded_before_the_product() -> None:
    gate_up, out = noise(50, 2 * 640).bfloat16(), torch.empty(50, 640, dtype=torch.bfloat16)
    gate_up.clamp_(min=-5)  # below, torch's 1 + tanh is 0 even in fp64
    geglu(gate_up, out=out)
    gate, up = gate_up.double().chunk(2, -1)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    assert (out != gelu.bfloat16() * up.bfloat16()).float().mean() < 1e-3
    assert (out != (gelu * up).bfloat16()).float().mean() > 0.1


def test_small_values_of_gelu_keep_their_precision() -> None:
    gate = torch.linspace(-4.9, -3, 500)[None]
    out = torch.empty_like(gate)
    geglu(torch.cat([gate, torch.ones_like(gate)], 1), out=out)
    truth = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    assert ((out - truth) / truth).abs().max() < 1e-5  # fp32's tanh is 2e-3 off here


def test_the_largest_gates_stay_finite() -> None:
    gate = torch.tensor([[-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38]])
    out = torch.empty_like(gate)
    geglu(torch.cat([gate, torch.ones_like(gate)], 1), out=out)
    assert out.tolist() == [gate.clamp(min=0)[0].tolist()]


def test_row_offsets_pass_2_to_the_31() -> None:
    gate_up, out = far_apart(3, 64, torch.bfloat16), far_apart(3, 32, torch.bfloat16)
    gate_up.copy_(noise(3, 64))
    geglu(gate_up, out=out)
    torch.testing.assert_close(out.clone(), definitions.geglu(gate_up.clone()))


def test_shapes_that_disagree_are_told() -> None:
    with pytest.raises(ValueError, match=r"gate_up must be \[2, 2 · 4\] with contiguous rows, got \[2, 9\]"):
        geglu(torch.zeros(2, 9), out=torch.zeros(2, 4))
