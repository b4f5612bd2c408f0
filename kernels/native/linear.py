"""Products with a weight in bf16, in C: for CPUs that multiply bf16 in vectors (AVX512_BF16), not in tiles.

Math     out = x @ weightᵀ, each entry one chain of sums in fp32, in pairs of the columns, then rounded
Traffic  the weight once for a step, from memory: it is asked for 4 KiB before it is used
Bits     an entry depends on its row and nothing else: not on the other rows, nor on how many there are

oneDNN asks for the weight late: with few rows, where the weight is all that is read, it is slower
(benchmarks/linear.py). With many both are at the instructions' limit.
"""

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.library import check, describe, function, library


def can_multiply() -> bool:
    """Whether this CPU has the instruction that it is made for, and no AMX, beside which it was not timed."""
    if library() is None or torch.cpu._is_amx_tile_supported():
        return False
    return bool(function("cabochon_can_multiply", "")())


def fits(weight: Tensor) -> bool:
    """Whether `pack` takes it: [N, K] bf16 on the CPU, both multiples of 16."""
    N, K = weight.shape
    is_known = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_known and N % LANES == 0 and K % LANES == 0


def pack(weight: Tensor) -> Tensor:
    """[N, K] to [N / 16, K / 2, 16, 2], as `linear` reads it. Raises ValueError if it does not fit."""
    if not fits(weight):
        raise ValueError(
            f"a weight must be bf16 with multiples of {LANES} rows and columns, got {describe(weight)}"
        )
    N, K = weight.shape
    packed = torch.empty((N // LANES, K // 2, LANES, 2), dtype=torch.bfloat16)
    weight = weight.contiguous()
    function("cabochon_pack_pairs", "ppiii")(
        weight.data_ptr(), packed.data_ptr(), N, K, torch.get_num_threads()
    )
    return packed


def linear(x: Tensor, packed: Tensor, *, out: Tensor) -> None:
    """x @ weightᵀ.

    x: [T, K] bf16. packed: of `pack`. out: [T, N] bf16. Only if `can_multiply`. Raises ValueError if they do
    not fit, MemoryError.
    """
    groups, pairs, lanes, two = packed.shape
    (T, K), N = x.shape, groups * LANES
    fit = x.dtype == torch.bfloat16 and (lanes, two) == (LANES, 2) and 2 * pairs == K and out.shape == (T, N)
    check(fit, x, packed, out)
    status = function("cabochon_linear", "pppiiii")(
        x.data_ptr(), packed.data_ptr(), out.data_ptr(), T, N, K, torch.get_num_threads()
    )
    if status:
        raise MemoryError(f"a product of {T} rows of {K} needs memory for a copy of them")
