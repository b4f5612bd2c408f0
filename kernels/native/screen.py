"""Which token has the largest logit, from a copy of the head in 8 bits: not nearly, but exactly. In C.

Math     |x·w − x̂·ŵ| ≤ ‖x‖ ‖w − ŵ‖ + ‖x − x̂‖ ‖ŵ‖. Who has an upper bound below another's lower one cannot win;
         the products of the others, a hundred of 262,144, are computed from the embedding, and compared
Traffic  a byte for each weight instead of two, read once for 16 rows; no logits are written
Bits     the winner by sums in fp32, the lowest token of those that share it: the same in every batch

ŵ is symmetric, a scale per row. x̂ has a scale by which all but its four largest elements fit a byte; those
are multiplied in several parts. Gemma's rows have elements twelve times the root mean square, always the
same ones. The bound grows while tokens are looked at, as sampling.c's does, by all threads together.
"""

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.library import check, check_floats, describe, function, how, library

TOKENS = 64  # the packed weight has a multiple of them


def can_screen() -> bool:
    """Whether this CPU has the instruction (VNNI) that makes it faster than the product itself."""
    return library() is not None and bool(function("cabochon_can_screen", "")())


def screen(
    x: Tensor, packed: Tensor, scales: Tensor, errors: Tensor, largest: float, embedding: Tensor
) -> Tensor:
    """The token with the largest logit of each row; −1 where thousands are too near, or x is not finite.

    x: [T, K], bf16 or fp32, K a multiple of 16. packed: [N', K], of ŵ, by quantize.pack. scales: [N'] fp32.
    errors: [N'] fp32, at least ‖w − ŵ‖ and the rounding of sums relative to ‖x‖, NaN past N. largest: at
    least ‖ŵ‖ of every row. embedding: [N, K]. Returns [T] int64. Raises ValueError if they do not fit,
    MemoryError.
    """
    (T, K), padded = x.shape, len(packed)
    check(embedding.shape[1] == K and K % LANES == 0 and 0 < K < 1 << 17, x, embedding)
    if packed.shape != (padded, K) or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"packed must be a contiguous [N', {K}] uint8, got {describe(packed)}")
    if padded != -(-len(embedding) // TOKENS) * TOKENS:
        raise ValueError(f"packed must be of the {len(embedding)} tokens of the embedding, got {padded}")
    check_floats(scales, padded)
    check_floats(errors, padded)
    chosen = torch.empty(T, dtype=torch.int64)
    status = function("cabochon_screen", "ppppfppiiiii")(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), errors.data_ptr(), largest, embedding.data_ptr(),
        chosen.data_ptr(), T, padded, K, *how(x),
    )  # fmt: skip
    if status:
        raise MemoryError(f"a head of {len(embedding)} tokens needs memory for the candidates of {T} rows")
    return chosen


def entries(x: Tensor, weight: Tensor) -> Tensor:
    """Single entries of a product, by the sums of `screen`. [C, K] each, of one dtype. Returns [C] fp32."""
    check(x.shape == weight.shape and x.shape[1] % LANES == 0, x, weight)
    out = torch.empty(len(x))
    function("cabochon_entries", "pppiiii")(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, *how(x)
    )
    return out
