"""Rows to e4m3, bit for bit the torch definition."""

import pytest
import torch
from guarded import SENTINEL, far_apart, guarded, noise

from cabochon.kernels import definitions
from cabochon.kernels.quantize_rows import MAX_TILE, quantize_rows

FP8 = torch.float8_e4m3fn
LENGTHS = [1, 3, 127, 256, 640, MAX_TILE - 1, MAX_TILE, MAX_TILE + 1, 2 * MAX_TILE + 7]


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Into strided rows whose surroundings must stay as they are."""
    memory = torch.full((len(x) + 2, x.shape[1] + 10), 0x55, dtype=torch.uint8)
    out = memory.view(FP8)[1:-1, 5:-5]
    scales = torch.full((len(x) + 2,), SENTINEL)
    quantize_rows(x, out=out, scales=scales[1:-1])
    values = out.view(torch.uint8).clone()
    memory[1:-1, 5:-5] = 0x55
    assert (memory == 0x55).all()
    assert (scales[[0, -1]] == SENTINEL).all()
    return values.view(FP8), scales[1:-1]


def assert_equals_the_definition(x: torch.Tensor) -> None:
    values, scales = quantized(x)
    expected, expected_scales = definitions.quantize_rows(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("K", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_and_scales_are_those_of_the_definition(K: int, dtype: torch.dtype) -> None:
    assert_equals_the_definition(guarded(noise(5, K).to(dtype)))


def test_a_batch_without_rows_is_fine() -> None:
    assert quantized(torch.empty(0, 64))[1].shape == (0,)


def test_by_hand() -> None:
    values, scales = quantized(torch.tensor([[448.0, -224.0, 17.0, 1.0], [0.5, 0.0, -1.0, 2.0**-9]]))
    assert scales.tolist() == [1.0, torch.tensor(1 / 448).item()]
    assert values.float().tolist() == [[448.0, -224.0, 16.0, 1.0], [224.0, 0.0, -448.0, 0.875]]


@pytest.mark.parametrize("gain", [0.0, 1e-44, 1e-30, 1e-13, 1e-12, 1e30, 3e38])
def test_rows_of_nothing_and_of_huge_values_keep_a_finite_scale_above_0(gain: float) -> None:
    x = noise(3, 640).clamp(-1, 1) * gain
    values, scales = quantized(x)
    assert (scales > 0).all()
    assert scales.isfinite().all()
    assert values.float().isfinite().all()
    assert_equals_the_definition(x)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # what stands in such a row has no meaning
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 639, MAX_TILE + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_shows_in_the_scale_of_its_row(bad: float, place: int, dtype: torch.dtype) -> None:
    x = noise(3, MAX_TILE + 64).to(dtype)
    clean_values, clean_scales = quantized(x)
    x[1, place] = bad
    values, scales = quantized(x)
    assert not scales[1].isfinite()
    assert torch.equal(scales.isnan(), definitions.quantize_rows(x)[1].isnan())
    assert torch.equal(scales[[0, 2]], clean_scales[[0, 2]])
    assert torch.equal(values[[0, 2]].view(torch.uint8), clean_values[[0, 2]].view(torch.uint8))


def test_a_row_is_bitwise_the_same_in_any_batch() -> None:
    x = noise(9, 640)
    values, scales = quantized(x)
    alone, scale = quantized(x[5:6])
    assert torch.equal(alone[0].view(torch.uint8), values[5].view(torch.uint8))
    assert scale[0] == scales[5]


def test_row_offsets_pass_2_to_the_31() -> None:
    x, out, scales = far_apart(3, 64, torch.bfloat16), far_apart(3, 64, torch.uint8).view(FP8), torch.empty(3)
    x.copy_(noise(3, 64))
    quantize_rows(x, out=out, scales=scales)
    expected, expected_scales = definitions.quantize_rows(x.clone())
    assert torch.equal(out.view(torch.uint8).clone(), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


def test_the_definition_is_within_half_a_step_of_e4m3() -> None:
    x = noise(50, 640).double()
    values, scales = definitions.quantize_rows(x.float())
    error = (values.double() * scales[:, None].double() - x).abs()
    # 3 bits of mantissa; below 2⁻⁶ steps of 2⁻⁹
    bound = torch.maximum(x.abs() * 2.0**-4, scales[:, None] * 2.0**-10) * (1 + 1e-6)
    assert (error <= bound).all()


def test_shapes_and_dtypes_that_disagree_are_told() -> None:
    x, out, scales = torch.zeros(2, 8), torch.zeros(2, 8, dtype=FP8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"out e4m3, got \[2, 8\] and \[2, 8\] torch.float32"):
        quantize_rows(x, out=torch.zeros(2, 8), scales=scales)
    with pytest.raises(ValueError, match=r"out e4m3, got \[2, 8\] and \[1, 8\]"):
        quantize_rows(x, out=out[:1], scales=scales)
    with pytest.raises(ValueError, match="rows must be contiguous, got strides"):
        quantize_rows(torch.zeros(8, 2).t(), out=out, scales=scales)
    with pytest.raises(ValueError, match=r"scales must be a contiguous \[2\] fp32, got \[3\]"):
        quantize_rows(x, out=out, scales=torch.zeros(3))
