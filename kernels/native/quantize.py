"""Weights in 8 bits, a scale per row: made in C, once, when a model is loaded.

Math     ŵ = scale · round(w / scale), scale = max |w| / 127 of a row: symmetric, −127 to 127
"""

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.library import check, check_floats, describe, function, how

PAIRS = 32  # of int8.c: rows of values are multiples
LARGEST = 127
TINY = 1e-37  # a scale of zeros: its inverse is finite
FOUR = 4  # of screen.c: elements of each token side by side
OFFSET = 128  # of screen.c, whose instruction takes the weight without a sign


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K], K a multiple of 16. Returns values [N, K'] int8, zeros from K to a multiple of 32, and
    scales [N] fp32. Raises ValueError if it does not fit.

    A row that is not finite has a scale that is not.
    """
    N, K = weight.shape
    weight = weight.contiguous()
    check(K % LANES == 0, weight)
    values, scales = torch.empty((N, -(-K // PAIRS) * PAIRS), dtype=torch.int8), torch.empty(N)
    function("cabochon_quantize", "pppiiiii")(
        weight.data_ptr(), values.data_ptr(), scales.data_ptr(), N, K, values.shape[1], *how(weight)
    )
    return values, scales


def quantize_weight_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of quantize_weight, bit for bit where the weight is finite."""
    N, K = weight.shape
    values = torch.zeros((N, -(-K // PAIRS) * PAIRS), dtype=torch.int8)
    scales = (weight.float().abs().amax(1) * (1 / LARGEST)).clamp_min(TINY)
    values[:, :K] = (weight.float() / scales[:, None]).round()
    return values, scales


def quantization_errors(weight: Tensor, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """‖w − ŵ‖ and ‖ŵ‖ of every row, [N] fp32 each, rounded.

    weight: [N, K]. values, scales: of quantize_weight. Raises ValueError if they do not fit.
    """
    N, K = weight.shape
    weight = weight.contiguous()
    check(K % LANES == 0, weight)
    _check_values(values, N, K)
    check_floats(scales, N)
    errors, norms = torch.empty(N), torch.empty(N)
    function("cabochon_quantize_errors", "pppppiiiii")(
        weight.data_ptr(), values.data_ptr(), scales.data_ptr(), errors.data_ptr(), norms.data_ptr(),
        N, K, values.shape[1], *how(weight),
    )  # fmt: skip
    return errors, norms


def pack(values: Tensor, num_columns: int, num_rows: int) -> Tensor:
    """In the order that screen.c reads. values: [N, K'] of K = num_columns, a multiple of 16.

    num_rows: N' ≥ N, a multiple of 16; zeros past N. Returns [N', K] uint8.
    """
    _check_values(values, len(values), num_columns)
    if num_rows % LANES or num_rows < len(values) or num_columns % LANES:
        raise ValueError(f"rows and columns must be multiples of {LANES}, got {num_rows}, {num_columns}")
    packed = torch.empty((num_rows, num_columns), dtype=torch.uint8)
    function("cabochon_pack", "ppiiiii")(
        values.data_ptr(), packed.data_ptr(), len(values), num_rows, num_columns, values.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip
    return packed


def pack_reference(values: Tensor, num_columns: int, num_rows: int) -> Tensor:
    """The definition of pack."""
    packed = torch.full((num_rows, num_columns), OFFSET, dtype=torch.uint8)
    packed[: len(values)] = (values[:, :num_columns].short() + OFFSET).to(torch.uint8)
    return packed.view(-1, LANES, num_columns // FOUR, FOUR).transpose(1, 2).reshape(packed.shape)


def _check_values(values: Tensor, N: int, K: int) -> None:
    padded = -(-K // PAIRS) * PAIRS
    if values.shape != (N, padded) or values.dtype != torch.int8 or not values.is_contiguous():
        raise ValueError(f"values must be a contiguous [{N}, {padded}] int8, got {describe(values)}")
