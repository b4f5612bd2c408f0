"""Products of rows in 16 bits with weights in 8, in C on the CPU.

Math     out = x̂ ŵᵀ, x̂ = scale · round(x / scale) with scale = max |x| / 32,512 of a row, ŵ in 8 bits likewise
Traffic  a byte for each weight, read once for all rows of a step up to what the cache holds
Bits     sums of integers are exact: a row's result depends on the row and the weight alone
"""

import math

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.library import check, check_floats, describe, function, how
from cabochon.kernels.native.quantize import PAIRS

FEWEST = 4  # rows of a weight
LARGEST = 32_512.0  # of x's values: 512 products by 127 fit an int32
SEGMENT = 8192  # of a row, between sums of integers in fp32
TINY = 1e-37  # a scale of zeros: its inverse is finite
X_STEP_ERROR = 0.51  # of a scale: half a step, and the division's rounding


def int8_linear(x: Tensor, values: Tensor, scales: Tensor, *, out: Tensor) -> None:
    """Multiply, scale and round once.

    x: [T, K], bf16 or fp32, K a multiple of 16. values: [N, K'] int8, N at least 4, K' the next multiple of
    32, zeros past K. scales: [N] fp32. out: [T, N]. Raises ValueError if they do not fit.

    A row of x that is not finite in one element is not in any of out.
    """
    x_values, x_scales = _memory_for(x, values, scales, out)
    (T, K), (N, padded) = x.shape, values.shape
    function("cabochon_int8_linear", "ppppppiiiiii")(
        x.data_ptr(), x_values.data_ptr(), x_scales.data_ptr(), values.data_ptr(), scales.data_ptr(),
        out.data_ptr(), T, N, K, padded, *how(x),
    )  # fmt: skip


def int8_head(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    embedding: Tensor,
    errors: Tensor,
    largest: float,
    *,
    out: Tensor,
) -> None:
    """As int8_linear; then what may be the largest of its row is computed again from the embedding.

    embedding: [N, K], of which the values are the approximation ŵ. errors: [N] fp32, at least ‖w − ŵ‖ and
    the rounding of sums relative to ‖x‖. largest: at least ‖ŵ‖ of every row. Raises ValueError, MemoryError.
    """
    x_values, x_scales = _memory_for(x, values, scales, out)
    (T, K), (N, padded) = x.shape, values.shape
    check(embedding.shape == (N, K), x, embedding)
    check_floats(errors, N)
    status = function("cabochon_int8_head", "pppppppfpiiiiii")(
        x.data_ptr(), x_values.data_ptr(), x_scales.data_ptr(), values.data_ptr(), scales.data_ptr(),
        embedding.data_ptr(), errors.data_ptr(), X_STEP_ERROR * math.sqrt(K) * largest, out.data_ptr(),
        T, N, K, padded, *how(x),
    )  # fmt: skip
    if status:
        raise MemoryError(f"a head of {N} tokens needs memory for the bounds of {T} rows")


def int8_linear_reference(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The definition of int8_linear, bit for bit, in T · N · K' integers of memory."""
    wide = torch.nn.functional.pad(x.float(), (0, values.shape[1] - x.shape[1]))
    x_scales = (wide.abs().amax(1) / LARGEST).clamp_min(TINY) + (wide * 0).sum(1)  # NaN, of infinity too
    rounded = torch.where(x_scales.isfinite()[:, None], wide / x_scales[:, None], 0).round_().long()
    products = rounded[:, None] * values.long()  # [T, N, K']
    totals = torch.zeros((*products.shape[:2], LANES))
    for segment in torch.split(products, SEGMENT, dim=2):
        totals += segment.reshape(*segment.shape[:2], segment.shape[2] // PAIRS, LANES, 2).sum((2, 4)).float()
    while totals.shape[2] > 1:
        low, high = totals.chunk(2, dim=2)
        totals = low + high
    return (totals[..., 0] * (x_scales[:, None] * scales)).to(x.dtype)


def _memory_for(x: Tensor, values: Tensor, scales: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """For x in 16 bits, [T, K'] int16, and its scales [T]. Raises ValueError if the arguments do not fit."""
    (T, K), N, padded = x.shape, len(values), -(-x.shape[1] // PAIRS) * PAIRS
    check(out.shape == (T, N) and K % LANES == 0 and N >= FEWEST, x, out)
    if values.shape != (N, padded) or values.dtype != torch.int8 or not values.is_contiguous():
        raise ValueError(f"values must be a contiguous [{N}, {padded}] int8, got {describe(values)}")
    check_floats(scales, N)
    return torch.empty((T, padded), dtype=torch.int16), torch.empty(T)
