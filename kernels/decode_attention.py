"""Attention of sequences that compute one token: keys are cut into splits, whose sums are added afterwards.

Math     out = Σ acc / Σ l over the splits, with acc = Σ p V and l = Σ p over a split's keys; without a
         softcap both weighted by exp2(m − max m). Definition: paged_attention.paged_attention_reference
Grid     (Hkv, S, programs), then (Hq, S) for the merge. A split is `split_tokens` keys, counted from the
         window's start: what is added to what depends on the position alone, not on the batch, the length of
         the table nor the number of programs, which share the splits of a sequence
Traffic  K and V once; per split G · D fp32 out and in again (1.6 % at D = 256, G = 2, 256 tokens, bf16)
Source   flash-decoding (pytorch.org/blog/flash-decoding); splits of fixed size, fixed maximum: ours
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec
from cabochon.kernels.attention_tiles import attend_keys, empty_state
from cabochon.kernels.paged_inputs import check_pages, element_types, fp8_bytes, kv_bits, softmax_constants
from cabochon.kernels.tuning import rows, sm_of, tuned

UNALIGNED = frozenset({"page_rows", "token_rows", "head_rows", "scales_token_stride", "page_table_stride"})
MIN_ROWS = 16  # the smallest product of tensor cores


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """split_tokens: keys of a split, a multiple of block_n. programs: in all; one a head and row at least."""

    split_tokens: int
    block_n: int
    programs: int
    num_warps: int
    num_stages: int


class DecodeWorkspace(NamedTuple):
    """Sums of splits: acc [S, Hq, splits, D], total and maximum [S, Hq, splits], fp32; any content."""

    acc: Tensor
    total: Tensor
    maximum: Tensor


def num_splits(max_len: int, window: int | None, split_tokens: int) -> int:
    """Splits that a sequence of max_len keys has at most."""
    return -(-(max_len if window is None else min(max_len, window)) // split_tokens)


def decode_workspace(
    num_seqs: int, num_heads: int, head_dim: int, splits: int, device: torch.device
) -> DecodeWorkspace:
    """Buffers for up to `num_seqs` sequences and `splits` splits each; any layer may use them in turn."""
    acc = torch.empty((num_seqs, num_heads, splits, head_dim), dtype=torch.float32, device=device)
    total, maximum = torch.empty((2, *acc.shape[:3]), dtype=torch.float32, device=device).unbind()
    return DecodeWorkspace(acc, total, maximum)


def decode_config(device: torch.device, head_dim: int, bits: int) -> DecodeConfig:
    """The table's entry, for callers that size a workspace. bits: `paged_inputs.kv_bits`."""
    return DecodeConfig(**tuned("decode_attention", device, head_dim=head_dim, kv_bits=bits))


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    out: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attend one query of each sequence to all its keys, its own the last.

    q: [S, Hq, D] bf16, fp16 or fp32, rows contiguous. k_pages, v_pages: [N, P, Hkv, D] in q's dtype, or e4m3
    with k_scales, v_scales: [N, P, Hkv] fp32. page_table: [S, M] int32; M · P bounds the grid, so a CUDA
    graph holds for all lengths. seq_lens: [S] int32, keys; a sequence of none gets zeros. workspace: for S
    sequences and num_splits(M · P, window, split_tokens) splits or more. Returns out, [S, Hq, D].
    Raises ValueError if shapes, dtypes or strides do not fit.
    """
    check_pages(q, k_pages, v_pages, page_table, seq_lens, k_scales, v_scales)
    (S, Hq, D), (_, P, Hkv, _) = q.shape, k_pages.shape
    if q.shape[0] != len(seq_lens):
        raise ValueError(f"q must have one row per sequence, S = {len(seq_lens)}, got {S}")
    out = torch.empty_like(q) if out is None else out
    if S == 0:
        return out
    config = config or decode_config(q.device, D, kv_bits(q, k_pages))
    splits = num_splits(page_table.shape[1] * P, window, config.split_tokens)
    workspace = workspace or decode_workspace(S, Hq, D, splits, q.device)
    _check_workspace(workspace, (S, Hq, splits, D))
    constants = softmax_constants(scale, softcap, q.dtype)
    k_pages, v_pages = fp8_bytes(k_pages), fp8_bytes(v_pages)
    scale_strides = (0, 0) if k_scales is None else k_scales.stride()[:2]
    programs = min(splits, max(1, config.programs // (S * Hkv)))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    flags = {"D": D, "SPLIT": config.split_tokens, "HAS_WINDOW": window is not None,
             "IS_STATIC": constants.is_static}  # fmt: skip
    _split_kernel[(Hkv, S, programs)](
        q, k_pages, v_pages, k_scales, v_scales, *workspace, page_table, seq_lens,
        window or 0, constants.to_unit, constants.to_exp2, *q.stride()[:2], *workspace.acc.stride()[:2],
        *(stride // D for stride in k_pages.stride()[:3]), *scale_strides, page_table.stride(0),
        G=Hq // Hkv, P=P, ROWS=max(MIN_ROWS, triton.next_power_of_2(Hq // Hkv)), BLOCK_N=config.block_n,
        HAS_SOFTCAP=softcap is not None, HAS_SCALES=k_scales is not None, **flags, **options,
    )  # fmt: skip
    _merge_kernel[(Hq, S)](
        *workspace, out, seq_lens, window or 0, *workspace.acc.stride()[:2], *out.stride()[:2],
        MAX_SPLITS=triton.next_power_of_2(splits), **flags, num_warps=max(1, D // 128),
    )  # fmt: skip
    return out


def _check_workspace(workspace: DecodeWorkspace, needed: tuple[int, int, int, int]) -> None:
    """One that is larger is fine in S and in splits."""
    S, Hq, splits, D = workspace.acc.shape
    fits = (Hq, D) == needed[1::2] and needed[0] <= S and splits >= needed[2]
    if not (fits and workspace.acc.is_contiguous()):
        raise ValueError(f"workspace must hold [S, Hq, splits, D] = {list(needed)}, got {[S, Hq, splits, D]}")


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, acc_ptr, total_ptr, maximum_ptr, page_table_ptr,
    seq_lens_ptr, W, to_unit, to_exp2, q_stride_s, q_stride_h, acc_stride_s, acc_stride_h,
    page_rows, token_rows, head_rows, scales_page_stride, scales_token_stride, page_table_stride,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_STATIC: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):  # fmt: skip
    head, seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    low = tl.maximum(seq_len - W, 0) if HAS_WINDOW else 0

    r, d = tl.arange(0, ROWS), tl.arange(0, D)
    valid, h = r < G, head * G + r
    q_ptrs = q_ptr + seq * q_stride_s + (h * q_stride_h)[:, None] + d[None, :]
    q = tl.load(q_ptrs, mask=valid[:, None], other=0.0)  # [ROWS, D]
    position = tl.full([ROWS], 0, tl.int32) + seq_len - 1

    k_ptr, v_ptr = k_ptr + head * head_rows * D, v_ptr + head * head_rows * D
    if HAS_SCALES:
        k_scales_ptr, v_scales_ptr = k_scales_ptr + head, v_scales_ptr + head
    page_table_ptr += seq * page_table_stride
    pages = (k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, page_table_ptr)
    strides = (page_rows, token_rows, scales_page_stride, scales_token_stride)
    for split in range(tl.program_id(2), tl.cdiv(seq_len - low, SPLIT), tl.num_programs(2)):
        start = low + split * SPLIT
        end = tl.minimum(start + SPLIT, seq_len)
        whole = start + (end - start) // BLOCK_N * BLOCK_N
        state = empty_state(ROWS, D, 1)
        state = attend_keys(state, q, position, start, whole, start, W, pages, strides, to_unit, to_exp2, P,
                            D, 1, BLOCK_N, False, HAS_SOFTCAP, IS_STATIC, HAS_SCALES, False,
                            False)  # fmt: skip
        state = attend_keys(state, q, position, whole, end, start, W, pages, strides, to_unit, to_exp2, P,
                            D, 1, BLOCK_N, False, HAS_SOFTCAP, IS_STATIC, HAS_SCALES, False,
                            True)  # fmt: skip
        accs, total, maximum = state
        at = seq * acc_stride_s + h * acc_stride_h + split * D  # [ROWS], in acc; the others have one per D
        tl.store(acc_ptr + at[:, None] + d[None, :], accs[0], mask=valid[:, None])
        tl.store(total_ptr + at // D, total, mask=valid)
        if not IS_STATIC:
            tl.store(maximum_ptr + at // D, maximum, mask=valid)


@triton.jit
def _merge_kernel(
    acc_ptr, total_ptr, maximum_ptr, out_ptr, seq_lens_ptr, W, acc_stride_s, acc_stride_h, out_stride_s,
    out_stride_h, D: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_STATIC: tl.constexpr,
):  # fmt: skip
    h, seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    num = tl.cdiv(tl.minimum(seq_len, W) if HAS_WINDOW else seq_len, SPLIT)
    row = seq * acc_stride_s + h * acc_stride_h
    d = tl.arange(0, D)
    if not IS_STATIC:  # a maximum is exact in any order
        split = tl.arange(0, MAX_SPLITS)
        highest = tl.max(
            tl.load(maximum_ptr + row // D + split, mask=split < num, other=float("-inf")), axis=0
        )
    acc, total = tl.zeros([D], tl.float32), 0.0
    for first in range(0, num, 8):
        for i in tl.static_range(8):  # one after the other, but eight loads are on their way
            there = first + i < num
            at = row + (first + i) * D
            part = tl.load(acc_ptr + at + d, mask=there, other=0.0)
            part_total = tl.load(total_ptr + at // D, mask=there, other=0.0)
            if not IS_STATIC:
                m = tl.load(maximum_ptr + at // D, mask=there, other=float("-inf"))
                weight = tl.exp2(m - highest)
                part, part_total = part * weight, part_total * weight
            acc += part
            total += part_total
    y = acc / tl.where(total > 0, total, 1.0)  # a sequence without keys is zero
    tl.store(out_ptr + seq * out_stride_s + h * out_stride_h + d, y)


def compile_specs() -> list[CompileSpec]:
    """Both kernels in every configuration of the table: with and without a softcap, a window, G = 2."""
    specs = []
    for row in rows("decode_attention"):
        config, sm, D = DecodeConfig(**row.config), sm_of(row.gpu), row.keys["head_dim"]
        q, kv, scales = element_types(row.keys["kv_bits"], sm)
        for has_softcap in (True, False):
            flags = {"D": D, "SPLIT": config.split_tokens, "HAS_WINDOW": True, "IS_STATIC": has_softcap}
            constants = {
                **flags, "G": 2, "P": 16, "ROWS": MIN_ROWS, "BLOCK_N": config.block_n,
                "HAS_SOFTCAP": has_softcap, "HAS_SCALES": scales is not None,
            }  # fmt: skip
            state = ["*fp32"] * 3
            split = (q, kv, kv, scales, scales, *state, "*i32", "*i32", "i32", "fp32", "fp32", *["i32"] * 10)
            merge = (*state, q, "*i32", *["i32"] * 5)
            name = f"{row.gpu} {row.keys} softcap={has_softcap}"
            for kind, kernel, types, constant, warps in (
                ("decode", _split_kernel, split, constants, config.num_warps),
                ("merge", _merge_kernel, merge, {**flags, "MAX_SPLITS": 32}, max(1, D // 128)),
            ):
                specs.append(
                    CompileSpec(
                        name=f"{kind} {name}",
                        kernel=kernel,
                        sm=sm,
                        types=types,
                        constants=constant,
                        num_warps=warps,
                        num_stages=config.num_stages,
                        unaligned=UNALIGNED,
                    )
                )
    return specs
