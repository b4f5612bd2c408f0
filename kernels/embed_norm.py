"""Embedding rows, Gemma's scale and the first norm in one pass.

Math     r[t] = embedding[id[t]] · scale, rounded; x = rms(r) · weight
Scale    √E rounded to the weights' dtype (59.75 for 9B in bf16), as the checkpoints were trained
Grid     one program per token t; a row is one tile (E <= 8192), so no result depends on T
Traffic  reads T · E, writes 2 T · E elements: bound by memory bandwidth
Source   google/gemma_pytorch, gemma/model.py, GemmaForCausalLM; the weight is 1 + w in fp32
"""

import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels import definitions
from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm
from cabochon.kernels.rms_norm import check_rows, check_weight, normalized, row_warps


def embed_norm(
    token_ids: Tensor,
    embedding: Tensor,
    scale: float,
    unit_offset_weight: Tensor,
    eps: float,
    *,
    residual_out: Tensor,
    x_out: Tensor,
) -> None:
    """Look up, scale and normalize the rows of `token_ids`.

    token_ids: [T] int32 or int64, each in [0, V). embedding: [V, E]. scale: representable in its dtype.
    unit_offset_weight: [E] fp32. residual_out, x_out: [T, E], contiguous rows.
    Raises ValueError if shapes disagree.
    """
    check_rows(residual_out, x_out)
    check_weight(unit_offset_weight, embedding.shape[1])
    T, E = residual_out.shape
    if token_ids.shape != (T,) or embedding.shape[1] != E or embedding.stride(1) != 1:
        raise ValueError(
            f"token_ids must be [{T}] and embedding [V, {E}] with contiguous rows, "
            f"got {list(token_ids.shape)}, {list(embedding.shape)}"
        )
    _embed_norm_kernel[(T,)](
        token_ids, embedding, unit_offset_weight, residual_out, x_out,
        token_ids.stride(0), embedding.stride(0), residual_out.stride(0), x_out.stride(0), E, scale, eps,
        BLOCK_E=triton.next_power_of_2(E), num_warps=row_warps(E),
    )  # fmt: skip


def embed_norm_reference(
    token_ids: Tensor, embedding: Tensor, scale: float, unit_offset_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition, in the embedding's precision. Returns (residual, x), each [T, E]."""
    residual = embedding.index_select(0, token_ids) * scale
    return residual, definitions.rms_norm(residual, unit_offset_weight, eps)


@triton.jit
def _embed_norm_kernel(
    token_ids_ptr, embedding_ptr, weight_ptr, residual_out_ptr, x_out_ptr,
    token_ids_stride_t, embedding_stride_v, residual_out_stride_t, x_out_stride_t, E, scale, eps,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)  # int64: T · E can pass 2^31
    token_id = tl.load(token_ids_ptr + t * token_ids_stride_t).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    valid = e < E
    row = tl.load(embedding_ptr + token_id * embedding_stride_v + e, mask=valid, other=0.0)  # [BLOCK_E]
    residual = (row.to(tl.float32) * scale).to(residual_out_ptr.dtype.element_ty)
    tl.store(residual_out_ptr + t * residual_out_stride_t + e, residual, mask=valid)
    weight = tl.load(weight_ptr + e, mask=valid, other=0.0)
    x = normalized(residual.to(tl.float32), weight, E, eps)
    tl.store(x_out_ptr + t * x_out_stride_t + e, x, mask=valid)


def compile_specs() -> list[CompileSpec]:
    """Rows of 2304 and 4608."""
    types = ("*i64", "*bf16", "*fp32", "*bf16", "*bf16", *["i32"] * 5, "fp32", "fp32")
    return [
        spec
        for E in (2304, 4608)
        for spec in on_every_sm(
            _embed_norm_kernel, types, row_warps(E), {"BLOCK_E": triton.next_power_of_2(E)}
        )
    ]
