"""Rows to e4m3 with a scale each, in one kernel: what an fp8 product takes of its activations.

Math     s[t] = max(max_k |x[t, k]|, 1e-12) / 448, y[t, k] = x[t, k] / s[t] rounded to nearest even
Grid     one program per row t, tile after tile of it, twice: a maximum has no order, so no result
         depends on T or on the tiles
Traffic  reads T · K elements, writes T · K bytes; the second reading finds the row in a cache
Source   the definition is definitions.quantize_rows; e4m3's bits are made by integers (qkv_rope_write)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm
from cabochon.kernels.qkv_rope_write import e4m3_bits
from cabochon.kernels.rms_norm import row_warps

MAX_TILE = 4096  # not measured yet


def quantize_rows(x: Tensor, *, out: Tensor, scales: Tensor) -> None:
    """Write the rows of `x` to `out` in e4m3, divided by their scales.

    x: [T, K], contiguous rows. out: [T, K] e4m3, contiguous rows. scales: [T] fp32, contiguous. NaN or
    infinity in a row of x makes its scale so, and leaves its values in `out` without meaning.
    Raises ValueError if shapes or dtypes disagree.
    """
    if x.dim() != 2 or x.shape != out.shape or out.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"x and out must be [T, K], out e4m3, got {list(x.shape)} and {list(out.shape)} {out.dtype}"
        )
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"rows must be contiguous, got strides {x.stride()} and {out.stride()}")
    T, K = x.shape
    if scales.shape != (T,) or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales must be a contiguous [{T}] fp32, got {list(scales.shape)} {scales.dtype}")
    tile = _tile(K)
    _quantize_rows_kernel[(T,)](
        x, out.view(torch.uint8), scales, x.stride(0), out.stride(0), K,
        BLOCK_K=tile, num_warps=row_warps(tile),
    )  # fmt: skip


def _tile(row_len: int) -> int:
    return min(int(triton.next_power_of_2(row_len)), MAX_TILE)


@triton.jit
def _quantize_rows_kernel(x_ptr, out_ptr, scales_ptr, x_stride_t, out_stride_t, K, BLOCK_K: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # int64: T · K can pass 2^31
    x_ptr += t * x_stride_t
    out_ptr += t * out_stride_t
    k = tl.arange(0, BLOCK_K)
    # The bits of sizes order as they do, infinity and NaN last: a maximum of floats could lose a NaN
    sizes = tl.full([BLOCK_K], 0x2B8CBCCC, tl.int32)  # 1e-12
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        sizes = tl.maximum(sizes, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = tl.div_rn(tl.max(sizes, axis=0).to(tl.float32, bitcast=True), 448.0)
    tl.store(scales_ptr + t, scale)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + k, e4m3_bits(tl.div_rn(x, scale)), mask=start + k < K)


def compile_specs() -> list[CompileSpec]:
    """Gemma 2's hidden and MLP sizes of one tile (2304) and of several."""
    types = ("*bf16", "*u8", "*fp32", "i32", "i32", "i32")
    return [
        spec
        for tile in (_tile(2304), _tile(2048))
        for spec in on_every_sm(_quantize_rows_kernel, types, row_warps(tile), {"BLOCK_K": tile})
    ]
