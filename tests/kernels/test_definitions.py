"""The torch definitions: hand-computed values, and bitwise independence of the rows around."""

import math

import pytest
import torch
import torch.nn.functional as F

from cabochon.kernels.definitions import geglu, rms_norm, rope, rope_table, softcap_
from cabochon.kernels.error_budget import assert_within_budget


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])  # mean of squares 12.5
    y = rms_norm(x, torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3 / 12.5**0.5, 8 / 12.5**0.5]]))


def test_rms_norm_rounds_once() -> None:
    x, weight = noise(5, 640), 1 + noise(640, seed=1) * 0.1
    truth = rms_norm(x.bfloat16().double(), weight.double(), 1e-6)
    assert torch.equal(rms_norm(x.bfloat16(), weight, 1e-6), truth.bfloat16())


def test_rope_rotates_pairs_of_halves() -> None:
    cos, sin = rope_table(4, 4, theta=100.0)  # angles: position · (1, 0.1)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    y = rope(x, cos[3:4], sin[3:4])[0, 0]
    expected = [
        1 * math.cos(3) - 3 * math.sin(3),
        2 * math.cos(0.3) - 4 * math.sin(0.3),
        3 * math.cos(3) + 1 * math.sin(3),
        4 * math.cos(0.3) + 2 * math.sin(0.3),
    ]
    torch.testing.assert_close(y, torch.tensor(expected))


def test_rope_factor_divides_positions() -> None:
    cos, sin = rope_table(33, 8, theta=1e6, factor=8.0)
    plain_cos, plain_sin = rope_table(5, 8, theta=1e6)
    torch.testing.assert_close(cos[::8], plain_cos)
    torch.testing.assert_close(sin[::8], plain_sin)


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 200])
def test_geglu_is_torchs_gelu_times_up(rows: int) -> None:
    x = noise(rows, 2 * 24)
    torch.testing.assert_close(geglu(x), F.gelu(x[:, :24], approximate="tanh") * x[:, 24:])


def test_geglu_rounds_gelu_before_the_product() -> None:
    x = noise(100, 2 * 32).bfloat16()
    gate, up = x.chunk(2, -1)
    assert_within_budget(geglu(x), F.gelu(gate, approximate="tanh") * up, geglu(x.double()))


def test_softcap_by_hand() -> None:
    torch.testing.assert_close(
        softcap_(torch.tensor([0.0, 50.0, 1e4]), 50.0), torch.tensor([0, 50 * math.tanh(1), 50])
    )


@pytest.mark.parametrize("op", [torch.exp, torch.tanh, torch.sqrt, torch.reciprocal])
def test_an_elements_result_does_not_depend_on_its_place(op: type) -> None:
    x = noise(20_000).abs() + 0.01
    whole = op(x)
    for start in (0, 1, 7, 13):
        for length in (1, 3, 8, 31, 1000, 17_001):
            assert torch.equal(op(x[start : start + length].clone()), whole[start : start + length])


@pytest.mark.parametrize("width", [8, 96, 640])
def test_rows_are_bitwise_the_same_in_any_batch(width: int) -> None:
    x, weight = noise(203, width), 1 + noise(width, seed=1)
    norm, mlp = rms_norm(x, weight, 1e-6), geglu(x)
    for start, end in ((0, 4), (3, 7), (64, 68), (100, 203)):
        assert torch.equal(rms_norm(x[start:end].clone(), weight, 1e-6), norm[start:end])
        assert torch.equal(geglu(x[start:end].clone()), mlp[start:end])
