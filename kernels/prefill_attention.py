"""Attention of prompts and chunks: packed queries of any lengths over paged K and V.

Math     out = softmax(mask(cap · tanh(scale / cap · q Kᵀ))) V; query p sees key k iff p − W < k <= p.
         Definition: paged_attention.paged_attention_reference; tile math: attention_tiles
Grid     (Hkv, query tiles); BLOCK_M rows are BLOCK_M / G tokens times the G query heads of a KV head
Tiles    keys in tiles of BLOCK_N at absolute positions, in order: a row's bits depend neither on how its
         prompt was cut nor on its neighbours. Tiles no row sees are skipped, only edge tiles are masked
Traffic  K and V once per query tile; bound by the two products: 4 · T · keys · Hq · D operations
Source   arXiv:2307.08691 (order of loops), arXiv:2305.13245 (grouped heads)
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec
from cabochon.kernels.attention_tiles import attend_keys, empty_state
from cabochon.kernels.paged_inputs import check_pages, element_types, fp8_bytes, kv_bits, softmax_constants
from cabochon.kernels.tuning import rows, sm_of, tuned

UNALIGNED = frozenset(
    {"S", "page_rows", "token_rows", "head_rows", "scales_token_stride", "page_table_stride"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """Rows (tokens · G) and keys of a tile; parts of V: see attention_tiles.

    use_ptx_tanh: one instruction with an absolute error of 5e-4, so 0.025 of a score under a cap of 50.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int
    use_ptx_tanh: bool


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    out: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Attend the last queries of each sequence to its keys, their own included, all read from pages.

    q: [T, Hq, D] bf16, fp16 or fp32, rows contiguous. k_pages, v_pages: [N, P, Hkv, D] in q's dtype, or e4m3
    with k_scales, v_scales: [N, P, Hkv] fp32. page_table: [S, M] int32. cu_seqlens_q: [S + 1] int32, may
    start above 0: the tokens before are another kernel's. seq_lens: [S] int32, keys of each sequence.
    out: [T, Hq, D]; tokens of no sequence are left as they are, or zero if out is not given. Returns out.
    Raises ValueError if shapes, dtypes or strides do not fit.
    """
    check_pages(q, k_pages, v_pages, page_table, seq_lens, k_scales, v_scales)
    (T, Hq, D), Hkv, S = q.shape, k_pages.shape[2], len(seq_lens)
    if cu_seqlens_q.shape != (S + 1,):
        raise ValueError(f"cu_seqlens_q must be [S + 1] = [{S + 1}], got {list(cu_seqlens_q.shape)}")
    out = torch.zeros_like(q) if out is None else out
    if T == 0 or S == 0:
        return out
    if config is None:
        row = tuned("prefill_attention", q.device, head_dim=D, kv_bits=kv_bits(q, k_pages))
        config = PrefillConfig(**row)
    G = Hq // Hkv
    use_ptx_tanh = config.use_ptx_tanh and q.dtype != torch.float32 and not triton.knobs.runtime.interpret
    constants = softmax_constants(scale, softcap, q.dtype)
    k_pages, v_pages = fp8_bytes(k_pages), fp8_bytes(v_pages)
    scale_strides = (0, 0) if k_scales is None else k_scales.stride()[:2]
    grid = (Hkv, T // (config.block_m // G) + S)  # at most: sequence s begins at tile cu[s] // (M / G) + s
    _prefill_kernel[grid](
        q, k_pages, v_pages, k_scales, v_scales, out, page_table, cu_seqlens_q, seq_lens,
        S, window or 0, constants.to_unit, constants.to_exp2, *q.stride()[:2], *out.stride()[:2],
        *(stride // D for stride in k_pages.stride()[:3]), *scale_strides, page_table.stride(0),
        G=G, P=k_pages.shape[1], D=D, PARTS=config.parts, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, IS_STATIC=constants.is_static,
        HAS_SCALES=k_scales is not None, USE_PTX_TANH=use_ptx_tanh,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


@triton.jit
def _find_sequence(cu_seqlens_q_ptr, tile, S, BLOCK_Q: tl.constexpr):
    """The last sequence that begins at `tile` or before, by bisection: S is not known on the host."""
    before = tl.load(cu_seqlens_q_ptr)
    low, high = tile * 0, S  # tile * 0: a tensor, as the loop needs
    while high - low > 1:
        middle = (low + high) // 2
        begin = (tl.load(cu_seqlens_q_ptr + middle) - before) // BLOCK_Q + middle
        low = tl.where(begin <= tile, middle, low)
        high = tl.where(begin <= tile, high, middle)
    return low, (tl.load(cu_seqlens_q_ptr + low) - before) // BLOCK_Q + low


@triton.jit
def _unmasked_range(first, last, W, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The keys of whole tiles that queries first..last all see, and the tile where the first one's begin."""
    low, start = 0, 0
    if HAS_WINDOW:
        low = tl.maximum(first - W + 1, 0) // BLOCK_N * BLOCK_N
        start = (tl.maximum(last - W + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return low, start, tl.maximum((first + 1) // BLOCK_N * BLOCK_N, start)


@triton.jit(do_not_specialize=["S"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, out_ptr, page_table_ptr, cu_seqlens_q_ptr, seq_lens_ptr,
    S, W, to_unit, to_exp2, q_stride_t, q_stride_h, out_stride_t, out_stride_h,
    page_rows, token_rows, head_rows, scales_page_stride, scales_token_stride, page_table_stride,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_STATIC: tl.constexpr,
    HAS_SCALES: tl.constexpr, USE_PTX_TANH: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    head, tile = tl.program_id(0), tl.program_id(1)
    seq, seq_tile = _find_sequence(cu_seqlens_q_ptr, tile, S, BLOCK_Q)
    q_start = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
    tile = (q_len + BLOCK_Q - 1) // BLOCK_Q - 1 - (tile - seq_tile)  # the last tile has the most keys: first
    if tile < 0:
        return
    context = tl.load(seq_lens_ptr + seq) - q_len
    first = context + tile * BLOCK_Q
    last = context + tl.minimum((tile + 1) * BLOCK_Q, q_len) - 1
    r, d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    position = first + r // G
    valid = (r < BLOCK_Q * G) & (position <= last)
    token = (q_start + tile * BLOCK_Q + r // G).to(tl.int64)
    h = head * G + r % G
    q_ptrs = q_ptr + (token * q_stride_t + h * q_stride_h)[:, None] + d[None, :]
    q = tl.load(q_ptrs, mask=valid[:, None], other=0.0)  # [M, D]

    k_ptr, v_ptr = k_ptr + head * head_rows * D, v_ptr + head * head_rows * D
    if HAS_SCALES:
        k_scales_ptr, v_scales_ptr = k_scales_ptr + head, v_scales_ptr + head
    page_table_ptr += seq.to(tl.int64) * page_table_stride
    pages = (k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, page_table_ptr)
    strides = (page_rows, token_rows, scales_page_stride, scales_token_stride)
    state = empty_state(BLOCK_M, D, PARTS)
    seen = tl.maximum(first - W + 1, 0) if HAS_WINDOW else 0
    low, inner_start, inner_end = _unmasked_range(first, last, W, BLOCK_N, HAS_WINDOW)
    if HAS_WINDOW:
        edge = tl.minimum(inner_start, last + 1)
        state = attend_keys(state, q, position, low, edge, seen, W, pages, strides, to_unit, to_exp2, P, D,
                            PARTS, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, IS_STATIC, HAS_SCALES, USE_PTX_TANH,
                            True)  # fmt: skip
    state = attend_keys(state, q, position, inner_start, inner_end, seen, W, pages, strides, to_unit, to_exp2,
                        P, D, PARTS, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, IS_STATIC, HAS_SCALES, USE_PTX_TANH,
                        False)  # fmt: skip
    state = attend_keys(state, q, position, inner_end, last + 1, seen, W, pages, strides, to_unit, to_exp2,
                        P, D, PARTS, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, IS_STATIC, HAS_SCALES, USE_PTX_TANH,
                        True)  # fmt: skip

    accs, total, _ = state
    # Loaded again: else the rows' pointers stay in registers through the loops, and sm_90 spills at D = 256
    q_start = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
    seq_token = tile * BLOCK_Q + r // G
    valid = (r < BLOCK_Q * G) & (seq_token < q_len)
    token = (q_start + seq_token).to(tl.int64)
    total = tl.where(total > 0, total, 1.0)[:, None]  # a row that sees nothing is zero
    out_ptrs = out_ptr + (token * out_stride_t + h * out_stride_h)[:, None]
    for part in tl.static_range(PARTS):
        e = part * (D // PARTS) + tl.arange(0, D // PARTS)[None, :]
        tl.store(out_ptrs + e, accs[part] / total, mask=valid[:, None])


def compile_specs() -> list[CompileSpec]:
    """The kernel in every configuration of the table: with and without a softcap, a window, G = 2."""
    specs = []
    for row in rows("prefill_attention"):
        config, sm = PrefillConfig(**row.config), sm_of(row.gpu)
        q, kv, scales = element_types(row.keys["kv_bits"], sm)
        for has_softcap in (True, False):
            constants = {
                "G": 2, "P": 16, "D": row.keys["head_dim"], "PARTS": config.parts, "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n, "HAS_WINDOW": True, "HAS_SOFTCAP": has_softcap,
                "IS_STATIC": has_softcap, "HAS_SCALES": scales is not None,
                "USE_PTX_TANH": config.use_ptx_tanh,
            }  # fmt: skip
            types = (q, kv, kv, scales, scales, q, *["*i32"] * 3, "i32", "i32", "fp32", "fp32", *["i32"] * 10)
            specs.append(
                CompileSpec(
                    name=f"prefill {row.gpu} {row.keys} softcap={has_softcap}",
                    kernel=_prefill_kernel,
                    sm=sm,
                    types=types,
                    constants=constants,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    unaligned=UNALIGNED,
                )
            )
    return specs
