"""Which token has the largest logit, or wins a draw, from a copy of the head in 8 bits: exactly. In C.

Math     |x·w − x̂·ŵ| ≤ |x|·|w − ŵ| + ‖x − x̂‖ ‖ŵ‖, the first at most ½ scale Σ|x| over the largest elements of
         x, and ‖x‖ ‖w − ŵ‖ of the rest. Who has an upper bound below another's lower one cannot win; the
         products of the others, a hundred of 262,144, are computed from the embedding, and compared
Traffic  a byte for each weight instead of two, read once for 16 rows; no logits are written
Draws    the same, of capped logits over a temperature, with bounds of each token's noise (noise.h)
Bits     the winner by sums in fp32, the lowest token of those that share it: the same in every batch

ŵ is symmetric, a scale per row. x̂ has a scale by which all but its four largest elements fit a byte; those
are multiplied in several parts. Gemma's rows have elements twelve times the root mean square, always the
same ones. The bound grows while tokens are looked at, as sampling.c's does, by all threads together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.library import check, check_floats, describe, function, how, library

TOKENS = 64  # the packed weight has a multiple of them
MAX_COLUMNS = 1 << 15  # of the weight: more roundings of a sum than the bounds allow for
DRAWN = 64  # of the C source: tokens that may be left of a draw
CAPACITY = 1 << 15  # of the C source: candidates of a row


def can_screen() -> bool:
    """Whether this CPU has the instruction that it is made for (VNNI)."""
    return library() is not None and bool(function("cabochon_can_screen", "")())


class Screened(NamedTuple):
    """What is left of the vocabulary for each row: num_tokens [T] int32 of token_ids, logits [T, DRAWN]; −1
    where too many are too near, or x is not finite, or so small that squares vanish."""

    token_ids: Tensor
    logits: Tensor
    num_tokens: Tensor


def screen(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    errors: Tensor,
    largest: float,
    embedding: Tensor,
    draws: Sequence[tuple[float, int] | None] | None = None,
    cap: float | None = None,
) -> Screened:
    """The token with the largest logit of each row, or all that can win its draw.

    x: [T, K], bf16 or fp32, K a multiple of 16. packed: [N', K], of ŵ, by quantize.pack. scales: [N'] fp32.
    errors: [N'] fp32, at least ‖w − ŵ‖, of which no element is above half its scale. largest: at least ‖w‖ of
    every row. embedding: [N, K]. draws: temperature and noise key of each row that draws; cap: of its logits.
    Raises ValueError if they do not fit, MemoryError.
    """
    (T, K), padded = x.shape, len(packed)
    check(embedding.shape[1] == K and K % LANES == 0 and 0 < K <= MAX_COLUMNS, x, embedding)
    if packed.shape != (padded, K) or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"packed must be a contiguous [N', {K}] uint8, got {describe(packed)}")
    if padded != -(-len(embedding) // TOKENS) * TOKENS:
        raise ValueError(f"packed must be of the {len(embedding)} tokens of the embedding, got {padded}")
    check_floats(scales, padded)
    check_floats(errors, padded)
    asked = [(0.0, 0) if draw is None else draw for draw in draws or [None] * T]
    temperatures = torch.tensor([temperature for temperature, _ in asked], dtype=torch.float32)
    keys = torch.tensor([key for _, key in asked], dtype=torch.uint64)
    check_floats(temperatures, T)
    found = Screened(
        torch.empty((T, DRAWN), dtype=torch.int32), torch.empty((T, DRAWN)), torch.empty(T, dtype=torch.int32)
    )
    status = function("cabochon_screen", "ppppfpppfpppiiiii")(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), errors.data_ptr(), largest, embedding.data_ptr(),
        temperatures.data_ptr(), keys.data_ptr(), cap or 0.0, *(part.data_ptr() for part in found),
        T, len(embedding), K, *how(x),
    )  # fmt: skip
    if status:
        raise MemoryError(f"a head of {len(embedding)} tokens needs memory for the candidates of {T} rows")
    return found


def entries(x: Tensor, weight: Tensor) -> Tensor:
    """Single entries of a product, by the sums of `screen`. [C, K] each, of one dtype. Returns [C] fp32."""
    check(x.shape == weight.shape and x.shape[1] % LANES == 0, x, weight)
    out = torch.empty(len(x))
    function("cabochon_entries", "pppiiii")(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, *how(x)
    )
    return out
