"""Gemma's sandwich in one pass: norm of the branch, residual add, norm for the next branch.

Math     y = rms(branch) · post; r = residual + y; x = rms(r) · pre
Rounding y is rounded to the working dtype, so is r, and x is the norm of the rounded r: as the definition and
         transformers do. Norms and sum are fp32 inside.
Grid     one program per token t; a row is one tile (E <= 8192), so no result depends on T
Traffic  reads 2 T · E, writes 2 T · E elements (T · E without the second norm): bound by memory bandwidth
Source   google/gemma_pytorch, gemma/model.py, Gemma2DecoderLayer; weights are 1 + w in fp32
"""

import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels import definitions
from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm
from cabochon.kernels.rms_norm import check_rows, check_weight, normalized, row_warps


def sandwich_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor | None,
    eps: float,
    *,
    residual_out: Tensor,
    x_out: Tensor | None,
) -> None:
    """Add the normalized branch to the residual, and normalize the sum for the next branch.

    branch, residual, residual_out, x_out: [T, E], contiguous rows; an output may be an input.
    post_weight, pre_weight: [E] fp32, already 1 + w. No pre_weight (after the last layer): no x_out.
    Raises ValueError if shapes disagree or only one of pre_weight and x_out is given.
    """
    if (pre_weight is None) != (x_out is None):
        raise ValueError("pre_weight and x_out go together: give both or neither")
    pre, x = (post_weight, branch) if pre_weight is None or x_out is None else (pre_weight, x_out)
    check_rows(branch, residual, residual_out, x)
    check_weight(post_weight, branch.shape[1])
    check_weight(pre, branch.shape[1])
    T, E = branch.shape
    _sandwich_norm_kernel[(T,)](
        branch, residual, post_weight, pre, residual_out, x,
        branch.stride(0), residual.stride(0), residual_out.stride(0), x.stride(0), E, eps,
        HAS_PRE=pre_weight is not None, BLOCK_E=triton.next_power_of_2(E), num_warps=row_warps(E),
    )  # fmt: skip


def sandwich_norm_reference(
    branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition, in the inputs' precision. Returns (residual, x), each [T, E]."""
    total = residual + definitions.rms_norm(branch, post_weight, eps)
    return total, definitions.rms_norm(total, pre_weight, eps)


@triton.jit
def _sandwich_norm_kernel(
    branch_ptr, residual_ptr, post_ptr, pre_ptr, residual_out_ptr, x_out_ptr,
    branch_stride_t, residual_stride_t, residual_out_stride_t, x_out_stride_t, E, eps,
    HAS_PRE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)  # int64: T · E can pass 2^31
    e = tl.arange(0, BLOCK_E)
    valid = e < E
    dtype = residual_out_ptr.dtype.element_ty
    branch = tl.load(branch_ptr + t * branch_stride_t + e, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_E]
    residual = tl.load(residual_ptr + t * residual_stride_t + e, mask=valid, other=0.0).to(tl.float32)
    post = tl.load(post_ptr + e, mask=valid, other=0.0)
    y = normalized(branch, post, E, eps).to(dtype).to(tl.float32)
    total = (residual + y).to(dtype)
    tl.store(residual_out_ptr + t * residual_out_stride_t + e, total, mask=valid)
    if HAS_PRE:
        pre = tl.load(pre_ptr + e, mask=valid, other=0.0)
        x = normalized(total.to(tl.float32), pre, E, eps)
        tl.store(x_out_ptr + t * x_out_stride_t + e, x, mask=valid)


def compile_specs() -> list[CompileSpec]:
    """Rows of 2304 and 4608, with and without the second norm."""
    types = ("*bf16", "*bf16", "*fp32", "*fp32", "*bf16", "*bf16", *["i32"] * 5, "fp32")
    return [
        spec
        for E in (2304, 4608)
        for has_pre in (True, False)
        for spec in on_every_sm(
            _sandwich_norm_kernel,
            types,
            row_warps(E),
            {"HAS_PRE": has_pre, "BLOCK_E": triton.next_power_of_2(E)},
        )
    ]
