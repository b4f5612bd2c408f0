"""What both attention kernels ask of their inputs, and the constants of their softmax. Torch only."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FIRST_SM_WITH_E4M3 = (9, 0)  # sm_89 has the conversion, but Triton 3.6 emits one that only sm_90 has


class SoftmaxConstants(NamedTuple):
    """p = exp2(to_exp2 · tanh(to_unit · score)), without a softcap exp2(to_exp2 · score).

    is_static: no maximum is subtracted. Not in fp16: weights up to exp(cap) exceed its range.
    """

    to_unit: float
    to_exp2: float
    is_static: bool


def softmax_constants(scale: float, softcap: float | None, dtype: torch.dtype) -> SoftmaxConstants:
    """Fold scale, cap and log2(e). dtype: of q, in which the weights are rounded."""
    if softcap is None:
        return SoftmaxConstants(1.0, scale * math.log2(math.e), False)
    return SoftmaxConstants(scale / softcap, softcap * math.log2(math.e), dtype != torch.float16)


def check_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    """Raise ValueError unless q [T, Hq, D], pages [N, P, Hkv, D], table [S, M] and scales [N, P, Hkv] fit."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pages.shape[2]
    if head_dim < 16 or head_dim & (head_dim - 1) or k_pages.shape[3] != head_dim:
        raise ValueError(
            f"head_dim must be a power of two ≥ 16 and the pages', got {head_dim} and {k_pages.shape[3]}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"Hq must be a multiple of Hkv = {num_kv_heads}, got {num_heads}")
    if k_pages.shape != v_pages.shape or k_pages.stride() != v_pages.stride():
        raise ValueError("k_pages and v_pages must have the same shape and strides")
    if q.stride(2) != 1 or k_pages.stride(3) != 1 or page_table.stride(1) != 1:
        raise ValueError("the last axis of q, k_pages, v_pages and page_table must be contiguous")
    if any(stride % head_dim for stride in k_pages.stride()[:3]):
        raise ValueError(f"strides of k_pages must be multiples of D = {head_dim}, got {k_pages.stride()}")
    if page_table.shape[0] != len(seq_lens):
        raise ValueError(f"page_table must have S = {len(seq_lens)} rows, got {page_table.shape[0]}")
    _check_dtypes(q, k_pages, v_pages, k_scales, v_scales)


def _check_dtypes(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> None:
    if q.dtype not in FLOATS:
        raise ValueError(f"q must be bf16, fp16 or fp32, got {q.dtype}")
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"pages must be {q.dtype} or e4m3, got {k_pages.dtype} and {v_pages.dtype}")
    if k_pages.dtype == q.dtype:
        if k_scales is not None or v_scales is not None:
            raise ValueError(f"pages in {q.dtype} have no scales: pass none")
        return
    for scales in (k_scales, v_scales):
        if scales is None or scales.shape != k_pages.shape[:3] or scales.dtype != torch.float32:
            raise ValueError(f"e4m3 pages need k_scales and v_scales {list(k_pages.shape[:3])} in fp32")
    assert k_scales is not None
    assert v_scales is not None
    if k_scales.stride() != v_scales.stride() or k_scales.stride(2) != 1:
        raise ValueError("k_scales and v_scales must have the same strides, and contiguous heads")


def fp8_bytes(pages: Tensor) -> Tensor:
    """e4m3 pages as bytes where the GPU cannot convert them; others as they are."""
    is_fp8 = pages.dtype == torch.float8_e4m3fn
    if is_fp8 and pages.is_cuda and torch.cuda.get_device_capability(pages.device) < FIRST_SM_WITH_E4M3:
        return pages.view(torch.uint8)
    return pages


def kv_bits(q: Tensor, k_pages: Tensor) -> int:
    """The table's key: bits of an element of K as it is multiplied if that is fp32, else as it is stored."""
    return 32 if q.dtype == torch.float32 else 8 * k_pages.itemsize


def element_types(kv_bits: int, sm: int) -> tuple[str, str, str | None]:
    """Triton's pointer types of q, pages of `kv_bits` and their scales on a GPU of architecture `sm`."""
    if kv_bits == 8:
        major, minor = FIRST_SM_WITH_E4M3
        return "*bf16", "*fp8e4nv" if sm >= 10 * major + minor else "*u8", "*fp32"
    dtype = {16: "*bf16", 32: "*fp32"}[kv_bits]
    return dtype, dtype, None
