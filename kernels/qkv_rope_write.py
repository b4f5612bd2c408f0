"""From the fused QKV product to rotated queries and to K and V in their pages, in one pass.

Math     per head: x = rms(x) · weight, rounded (queries and keys of Gemma 3); turned by the angle of the
         position in fp32, rounded once; values as they are. e4m3 pages: s = max |x| / 448, x / s rounded.
Grid     (token t, head of q, then k, then v), one warp each: a head's result depends on nothing else
Traffic  reads and writes T · (Hq + 2 Hkv) · D elements: bound by memory bandwidth
fp8      the bits of e4m3 are made by integers, so that GPUs before sm_89 can write such pages too
Source   arXiv:2104.09864 (NeoX halves); the definitions are definitions.rope and definitions.rms_norm
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels import definitions
from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm
from cabochon.kernels.rms_norm import check_weight


def qkv_rope_write(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    *,
    q_out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate queries into `q_out` and write keys and values to the tokens' slots.

    qkv: [T, (Hq + 2 Hkv) · D], contiguous rows. positions: [T] integers, 0 for padding.
    cos, sin: [max_len, D / 2] fp32, contiguous. slots: [T] int64, page · P + offset; −1 is never written.
    q_out: [T, Hq, D]. k_pages, v_pages: [N, P, Hkv, D] of qkv's dtype, or e4m3 with
    k_scales, v_scales: [N, P, Hkv] fp32. q_norm, k_norm: [D] fp32, already 1 + w; eps is theirs.
    Raises ValueError if shapes or dtypes disagree.
    """
    T, Hq, D = q_out.shape
    P, Hkv = k_pages.shape[1:3]
    is_fp8 = k_pages.dtype == torch.float8_e4m3fn
    _check(qkv, positions, cos, sin, slots, q_out, k_pages, v_pages)
    if is_fp8 != (k_scales is not None) or is_fp8 != (v_scales is not None):
        raise ValueError("k_scales and v_scales belong to e4m3 pages: give them exactly then")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together: give both or neither")
    for weight in (q_norm, k_norm):
        if weight is not None:
            check_weight(weight, D)
    if is_fp8:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    scale_strides = (0, 0) if k_scales is None else k_scales.stride()[:2]
    _qkv_rope_write_kernel[(T, Hq + 2 * Hkv)](
        qkv, positions, cos, sin, slots, q_norm, k_norm, q_out, k_pages, v_pages, k_scales, v_scales,
        qkv.stride(0), *q_out.stride()[:2], *k_pages.stride()[:3], *scale_strides, eps,
        Hq=Hq, Hkv=Hkv, D=D, P=P, HAS_NORM=q_norm is not None, IS_FP8=is_fp8, num_warps=1,
    )  # fmt: skip


def _check(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q_out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> None:
    T, Hq, D = q_out.shape
    width = (Hq + 2 * k_pages.shape[2]) * D
    if D & (D - 1) or qkv.shape != (T, width) or k_pages.shape[3] != D:
        raise ValueError(
            f"qkv must be [{T}, (Hq + 2 Hkv) · D] with D a power of two, got {list(qkv.shape)} for "
            f"q {list(q_out.shape)} and pages {list(k_pages.shape)}"
        )
    if positions.shape != (T,) or slots.shape != (T,) or slots.dtype != torch.int64:
        raise ValueError(f"positions and slots must be [{T}], slots int64")
    if k_pages.shape != v_pages.shape or k_pages.stride() != v_pages.stride():
        raise ValueError("k_pages and v_pages must have the same shape and strides")
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (qkv.dtype, torch.float8_e4m3fn):
        raise ValueError(f"pages must be {qkv.dtype} or e4m3, got {k_pages.dtype} and {v_pages.dtype}")
    if any(x.stride(-1) != 1 for x in (qkv, q_out, k_pages)) or not (
        cos.is_contiguous() and sin.is_contiguous()
    ):
        raise ValueError("the last axis of qkv, q_out and pages, and both tables must be contiguous")
    if cos.shape[1] != D // 2 or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must be [max_len, {D // 2}], got {list(cos.shape)} and {list(sin.shape)}"
        )


def qkv_rope_reference(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: tuple[int, int],
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in qkv's precision. num_heads: Hq, Hkv. Returns q, k and v, each [T, heads, D]."""
    Hq, Hkv = num_heads
    q, k, v = torch.split(
        qkv.view(len(qkv), Hq + 2 * Hkv, qkv.shape[1] // (Hq + 2 * Hkv)), [Hq, Hkv, Hkv], dim=1
    )
    if q_norm is not None and k_norm is not None:
        q, k = definitions.rms_norm(q, q_norm, eps), definitions.rms_norm(k, k_norm, eps)
    angles = cos[positions], sin[positions]
    return definitions.rope(q, *angles), definitions.rope(k, *angles), v


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """What e4m3 pages hold of K or V. x: [T, Hkv, D]. Returns e4m3 [T, Hkv, D] and scales [T, Hkv] fp32."""
    return definitions.quantize_rows(x)


@triton.jit
def e4m3_bits(x):
    """fp32 x, at most 448 in size, to e4m3, nearest even: its bits in uint8."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # 3 bits of mantissa; bias 127 becomes 7
    steps = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # below 2⁻⁶ in steps of 2⁻⁹
    code = tl.where(size >= 0x3C800000, normal, steps) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def _normalized_halves(low, high, weight_ptr, d, eps, D: tl.constexpr):
    scale = tl.rsqrt((tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / D + eps)
    return low * scale * tl.load(weight_ptr + d), high * scale * tl.load(weight_ptr + D // 2 + d)


@triton.jit
def _write_head(low, high, page_ptr, scales_ptr, scale_place, d, D: tl.constexpr, IS_FP8: tl.constexpr):
    if IS_FP8:
        largest = tl.maximum(tl.max(tl.abs(low), axis=0), tl.max(tl.abs(high), axis=0))
        scale = tl.div_rn(tl.maximum(largest, 1e-12), 448.0)
        tl.store(scales_ptr + scale_place, scale)
        tl.store(page_ptr + d, e4m3_bits(tl.div_rn(low, scale)))
        tl.store(page_ptr + D // 2 + d, e4m3_bits(tl.div_rn(high, scale)))
    else:
        tl.store(page_ptr + d, low)
        tl.store(page_ptr + D // 2 + d, high)


@triton.jit
def _qkv_rope_write_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, slots_ptr, q_norm_ptr, k_norm_ptr,
    q_out_ptr, k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr,
    qkv_stride_t, q_out_stride_t, q_out_stride_h, page_stride, token_stride, head_stride,
    scales_page_stride, scales_token_stride, eps,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    HAS_NORM: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)  # int64: T · (Hq + 2 Hkv) · D and N · P · Hkv · D pass 2^31
    head = tl.program_id(1)
    dtype = q_out_ptr.dtype.element_ty
    d = tl.arange(0, D // 2)
    head_ptr = qkv_ptr + t * qkv_stride_t + head * D
    low = tl.load(head_ptr + d).to(tl.float32)  # [D / 2]
    high = tl.load(head_ptr + D // 2 + d).to(tl.float32)
    if head < Hq + Hkv:
        if HAS_NORM:
            norm_ptr = q_norm_ptr if head < Hq else k_norm_ptr
            low, high = _normalized_halves(low, high, norm_ptr, d, eps, D)
            low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        angle = tl.load(positions_ptr + t).to(tl.int64) * (D // 2) + d
        cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
        low, high = low * cos - high * sin, high * cos + low * sin
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    if head < Hq:
        q_ptr = q_out_ptr + t * q_out_stride_t + head * q_out_stride_h
        tl.store(q_ptr + d, low)
        tl.store(q_ptr + D // 2 + d, high)
    else:
        slot = tl.load(slots_ptr + t)
        if slot >= 0:  # padding has none
            page, offset, kv_head = slot // P, slot % P, (head - Hq) % Hkv
            place = page * page_stride + offset * token_stride + kv_head * head_stride
            scale_place = page * scales_page_stride + offset * scales_token_stride + kv_head
            if head < Hq + Hkv:
                _write_head(low, high, k_pages_ptr + place, k_scales_ptr, scale_place, d, D, IS_FP8)
            else:
                _write_head(low, high, v_pages_ptr + place, v_scales_ptr, scale_place, d, D, IS_FP8)


def compile_specs() -> list[CompileSpec]:
    """Gemma 2 9B's heads and Gemma 3 270M's, with bf16 and e4m3 pages."""
    specs = []
    for is_fp8 in (False, True):
        pages, scales = ("*u8", "*fp32") if is_fp8 else ("*bf16", None)
        for Hq, Hkv, has_norm in ((16, 8, False), (4, 1, True)):
            norm = "*fp32" if has_norm else None
            types = (
                "*bf16", "*i64", "*fp32", "*fp32", "*i64", norm, norm, "*bf16", pages, pages, scales, scales,
                *["i32"] * 8, "fp32",
            )  # fmt: skip
            constants = {"Hq": Hq, "Hkv": Hkv, "D": 256, "P": 16, "HAS_NORM": has_norm, "IS_FP8": is_fp8}
            specs += on_every_sm(_qkv_rope_write_kernel, types, 1, constants)
    return specs
