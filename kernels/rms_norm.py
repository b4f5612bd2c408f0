"""RMSNorm of whole rows, and the tile function that the fused norms share.

Math     y[t, e] = x[t, e] · (mean_e x[t, e]² + eps)^-½ · weight[e], in fp32, rounded once at the end
Grid     one program per token t; a row is one tile (E <= MAX_ROW), so no result depends on T
Traffic  reads (T + 1) · E elements, writes T · E: bound by memory bandwidth
Source   arXiv:1910.07467 eq. 4. `weight` is Gemma's 1 + w in fp32; the definition is definitions.rms_norm
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm

MAX_ROW = 8192


def rms_norm(x: Tensor, unit_offset_weight: Tensor, eps: float, *, out: Tensor) -> None:
    """Normalize each row of `x` into `out`, which may be x.

    x, out: [T, E], contiguous rows. unit_offset_weight: [E] fp32, already 1 + w.
    Raises ValueError if shapes disagree, rows are strided inside or E > MAX_ROW.
    """
    check_rows(x, out)
    check_weight(unit_offset_weight, x.shape[1])
    T, E = x.shape
    _rms_norm_kernel[(T,)](
        x, unit_offset_weight, out, x.stride(0), out.stride(0), E, eps,
        BLOCK_E=triton.next_power_of_2(E), num_warps=row_warps(E),
    )  # fmt: skip


def check_rows(*tensors: Tensor) -> None:
    """Raise ValueError unless all are [T, E] of one shape with contiguous rows of at most MAX_ROW."""
    for x in tensors:
        if x.shape != tensors[0].shape or x.dim() != 2:
            raise ValueError(f"rows must be [T, E] = {list(tensors[0].shape)}, got {list(x.shape)}")
        if x.shape[1] > MAX_ROW or x.stride(1) != 1:
            raise ValueError(
                f"rows must be contiguous, at most {MAX_ROW} long, got E={x.shape[1]}, {x.stride()}"
            )


def check_weight(weight: Tensor, size: int) -> None:
    """Raise ValueError unless `weight` is a contiguous [size] in fp32."""
    if weight.shape != (size,) or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(
            f"weight must be a contiguous [{size}] fp32, got {list(weight.shape)} {weight.dtype}"
        )


def row_warps(row_len: int) -> int:
    """Warps of a program that holds one row: of its length alone, so that sums keep their order."""
    return 4 if row_len <= 2048 else 8  # not measured yet


@triton.jit
def normalized(row, weight, E, eps):
    """row: [BLOCK_E] fp32, 0 past E. weight: [BLOCK_E] fp32. Returns [BLOCK_E] fp32."""
    return row * tl.rsqrt(tl.sum(row * row, axis=0) / E + eps) * weight


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride_t, out_stride_t, E, eps, BLOCK_E: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # int64: T · E can pass 2^31
    e = tl.arange(0, BLOCK_E)
    valid = e < E
    x = tl.load(x_ptr + t * x_stride_t + e, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_E]
    weight = tl.load(weight_ptr + e, mask=valid, other=0.0)  # [BLOCK_E]
    tl.store(out_ptr + t * out_stride_t + e, normalized(x, weight, E, eps), mask=valid)


def compile_specs() -> list[CompileSpec]:
    """Rows of 2304 and 4608."""
    types = ("*bf16", "*fp32", "*bf16", "i32", "i32", "i32", "fp32")
    return [
        spec
        for E in (2304, 4608)
        for spec in on_every_sm(_rms_norm_kernel, types, row_warps(E), {"BLOCK_E": triton.next_power_of_2(E)})
    ]
