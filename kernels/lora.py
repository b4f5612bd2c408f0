"""LoRA adapters of a packed batch on top of a linear layer, in two launches: A · x, then B of that.

Math     out[t] += B[slot] · (A[slot] · x[t]) for the rows t of a tile; lora_definition has it in torch
Grid     (part and tile of rank, piece of K, tile of rows), then (tile of N, tile of rows). Pieces depend on K
         alone and are added in their order: no atomics, and a row's bits do not depend on its neighbours
Traffic  A and B of the adapters in use, up to their ranks, once a tile of rows; x; out in and out; per piece
         P · R fp32 a row out, and in again for each tile of N
Source   arXiv:2106.09685; the two launches are Punica's shrink and expand, arXiv:2310.18547
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm
from cabochon.kernels.lora_definition import TILE_ROWS, LoraWeights

BLOCK_R = 16  # of the second launch: the smallest product of tensor cores
MAX_PIECES = 4  # each costs a row P · R words, which every tile of N reads
MIN_PIECE = 512
PIECE_STEP = 256  # a multiple of every block_k


class _Blocks(NamedTuple):
    """Tile sizes and warps of both launches; block_n at most. None of them was measured yet."""

    block_k: int
    block_r: int
    shrink_warps: int
    shrink_stages: int
    block_n: int
    expand_warps: int


def _blocks(tile_rows: int, dtype: torch.dtype) -> _Blocks:
    """fp32 multiplies without tensor cores, its operands in registers: small tiles."""
    if dtype == torch.float32:
        return _Blocks(32, 16, 4, 2, 64, 4)
    if tile_rows == 16:
        return _Blocks(256, 16, 4, 4, 128, 4)
    return _Blocks(128, 32, 4, 3, 128, 8)


def scratch_words(num_rows: int, P: int, R: int) -> int:
    """fp32 numbers that `add_lora` needs for x of num_rows rows, P parts and slots of rank R, for any K."""
    return num_rows * MAX_PIECES * P * R


def add_lora(
    x: Tensor, weights: LoraWeights, tiles: Tensor, *, tile_rows: int, scratch: Tensor, out: Tensor
) -> None:
    """Add to each row of `out` what its adapter makes of the row of `x`; rows of no tile stay as they are.

    x: [T', K] bf16 or fp32, out: [T', N], contiguous rows; weights of their dtype, contiguous in each slot.
    tiles: [n, 3] int32, slot, first row, end row, of one slot and at most tile_rows rows each, without
    overlap; slot −1 is padding. tile_rows: one of TILE_ROWS. scratch: [scratch_words(T', P, R)]
    fp32 or longer, any content. Nothing on the device is read by the host: a CUDA graph can hold it.
    Raises ValueError if shapes, dtypes or strides do not fit.
    """
    _check(x, weights, tiles, tile_rows, scratch, out)
    a, b, ranks, part_ends = weights
    (T, K), N, P, R, n = x.shape, out.shape[1], len(part_ends), b.shape[2], len(tiles)
    if n == 0 or T == 0:
        return
    piece_len = _piece_len(K)
    num_pieces = triton.cdiv(K, piece_len)
    blocks = _blocks(tile_rows, x.dtype)
    _shrink_kernel[(P * triton.cdiv(R, blocks.block_r), num_pieces, n)](
        x, a, ranks, tiles, scratch, K, piece_len, x.stride(0), a.stride(0),
        P=P, R=R, TILE=tile_rows, BLOCK_K=blocks.block_k, BLOCK_R=blocks.block_r,
        num_warps=blocks.shrink_warps, num_stages=blocks.shrink_stages,
    )  # fmt: skip
    block_n = _block_n(part_ends, blocks.block_n)
    _expand_kernel[(N // block_n, n)](
        scratch, b, ranks, tiles, out, *(*part_ends, N)[:2], b.stride(0), out.stride(0),
        P=P, R=R, PIECES=num_pieces, TILE=tile_rows, BLOCK_N=block_n, BLOCK_R=BLOCK_R,
        num_warps=blocks.expand_warps,
    )  # fmt: skip


def _piece_len(K: int) -> int:
    return max(MIN_PIECE, -(-K // (MAX_PIECES * PIECE_STEP)) * PIECE_STEP)


def _sizes(part_ends: tuple[int, ...]) -> list[int]:
    return [end - begin for begin, end in zip((0, *part_ends), part_ends, strict=False)]


def _block_n(part_ends: tuple[int, ...], largest: int) -> int:
    """The largest power of two that divides every part: no tile of N has columns of two."""
    common = math.gcd(*_sizes(part_ends))
    return min(common & -common, largest)


def _check(
    x: Tensor, weights: LoraWeights, tiles: Tensor, tile_rows: int, scratch: Tensor, out: Tensor
) -> None:
    a, b, ranks, part_ends = weights
    (T, K), (S, N, R), P = x.shape, b.shape, len(part_ends)
    if a.shape != (S, P * R, K) or out.shape != (T, N) or ranks.shape != (S,):
        raise ValueError(
            f"a, b, ranks and out must be [S, P · R, K], [S, N, R], [S] and [T', N] with P = {P}, K = {K}"
            f" and T' = {T}, got {[list(tensor.shape) for tensor in (a, b, ranks, out)]}"
        )
    if any(tensor.dtype != x.dtype for tensor in (a, b, out)):
        raise ValueError(f"a, b and out must be {x.dtype} as x is, got {a.dtype}, {b.dtype} and {out.dtype}")
    if x.stride(1) != 1 or out.stride(1) != 1 or a.stride()[1:] != (K, 1) or b.stride()[1:] != (R, 1):
        raise ValueError(
            "rows of x and out, and the slots of a and b, must be contiguous, got strides"
            f" {[tensor.stride() for tensor in (x, out, a, b)]}"
        )
    if not 1 <= P <= 3 or part_ends[-1] != N or any(size < 1 or size % 16 for size in _sizes(part_ends)):
        raise ValueError(
            f"part_ends must be 1 to 3 ascending multiples of 16, the last N = {N}, got {part_ends}"
        )
    if tile_rows not in TILE_ROWS:
        raise ValueError(f"tile_rows must be one of {TILE_ROWS}, got {tile_rows}: cut tiles of such a size")
    if tiles.shape[1:] != (3,) or any(
        one.dtype != torch.int32 or not one.is_contiguous() for one in (tiles, ranks)
    ):
        raise ValueError(
            f"tiles [n, 3] and ranks [S] must be contiguous int32, got {list(tiles.shape)} {tiles.dtype}"
            f" and {ranks.dtype}"
        )
    if scratch.dtype != torch.float32 or not scratch.is_contiguous() or len(scratch) < scratch_words(T, P, R):
        raise ValueError(
            f"scratch must be {scratch_words(T, P, R)} contiguous fp32 numbers or more,"
            f" got {list(scratch.shape)} {scratch.dtype}"
        )


@triton.jit
def _tile(tiles_ptr, ranks_ptr, index):
    """Slot, first row, end row and rank of a tile; padding has rank 0."""
    slot = tl.load(tiles_ptr + 3 * index)
    rank = tl.load(ranks_ptr + slot, mask=slot >= 0, other=0)
    first, end = tl.load(tiles_ptr + 3 * index + 1), tl.load(tiles_ptr + 3 * index + 2)
    return slot.to(tl.int64), first, end, rank  # int64: S · P · R · K and S · N · R can pass 2^31


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, ranks_ptr, tiles_ptr, scratch_ptr, K, piece_len, x_stride_t, a_stride_s,
    P: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    RANK_TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    part, rank_start = tl.program_id(0) // RANK_TILES, tl.program_id(0) % RANK_TILES * BLOCK_R
    slot, first, end, rank = _tile(tiles_ptr, ranks_ptr, tl.program_id(2))
    if rank_start >= rank:
        return
    t = first.to(tl.int64) + tl.arange(0, TILE)  # int64: T' · K can pass 2^31
    r = rank_start + tl.arange(0, BLOCK_R)
    is_row, is_used = (t < end)[:, None], (r < rank)[:, None]
    x_ptrs = x_ptr + (t * x_stride_t)[:, None]
    a_ptrs = a_ptr + slot * a_stride_s + ((part * R + r) * K)[:, None]
    piece = tl.program_id(1)
    acc = tl.zeros([TILE, BLOCK_R], tl.float32)
    for start in range(piece * piece_len, tl.minimum((piece + 1) * piece_len, K), BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_ptrs + k, mask=is_row & (k < K), other=0.0)  # [TILE, BLOCK_K]
        a = tl.load(a_ptrs + k, mask=is_used & (k < K), other=0.0)  # [BLOCK_R, BLOCK_K]
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    at = (t * tl.num_programs(1) + piece) * (P * R) + part * R  # [TILE], in [T', pieces, P · R]
    # Up to R, not to the rank, whose size the compiler does not know: it would store word by word
    tl.store(scratch_ptr + at[:, None] + r[None, :], acc, mask=is_row & (r < R)[None, :])


@triton.jit
def _expand_kernel(
    scratch_ptr, b_ptr, ranks_ptr, tiles_ptr, out_ptr, end_0, end_1, b_stride_s, out_stride_t,
    P: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    slot, first, end, rank = _tile(tiles_ptr, ranks_ptr, tl.program_id(1))
    if rank == 0:
        return
    t = first.to(tl.int64) + tl.arange(0, TILE)  # int64: T' · N can pass 2^31
    is_row = (t < end)[:, None]
    n_start = tl.program_id(0) * BLOCK_N
    n = n_start + tl.arange(0, BLOCK_N)
    # With fewer parts than three, end_1 or both are N
    part = (n_start >= end_0).to(tl.int32) + (n_start >= end_1).to(tl.int32)
    scratch_ptrs = scratch_ptr + (t * (PIECES * P * R) + part * R)[:, None]
    b_ptrs = b_ptr + slot * b_stride_s + (n * R)[:, None]
    acc = tl.zeros([TILE, BLOCK_N], tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R))[None, :]
        low = tl.zeros([TILE, BLOCK_R], tl.float32)
        for piece in tl.static_range(PIECES):
            low += tl.load(scratch_ptrs + piece * (P * R) + r, mask=is_row & (r < R), other=0.0)
        b = tl.load(b_ptrs + r, mask=r < R, other=0.0)  # [BLOCK_N, BLOCK_R]
        # What stands beyond the rank can be NaN. Read and dropped: a mask of unknown size loads word by word
        b = tl.where(r < rank, b, 0.0)
        acc = tl.dot(low.to(b.dtype), tl.trans(b), acc, input_precision="ieee")
    out_ptrs = out_ptr + (t * out_stride_t)[:, None] + n[None, :]
    tl.store(out_ptrs, tl.load(out_ptrs, mask=is_row, other=0.0).to(tl.float32) + acc, mask=is_row)


def compile_specs() -> list[CompileSpec]:
    """Tiles of decodes and of prefills, in bf16 and fp32, with slots of rank 64 and three parts."""
    specs = []
    for dtype, element in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for tile_rows in TILE_ROWS:
            blocks = _blocks(tile_rows, dtype)
            sizes = {"P": 3, "R": 64, "TILE": tile_rows}
            shrink = (element, element, "*i32", "*i32", "*fp32", *["i32"] * 4)
            expand = ("*fp32", element, "*i32", "*i32", element, *["i32"] * 4)
            specs += on_every_sm(
                _shrink_kernel,
                shrink,
                blocks.shrink_warps,
                sizes | {"BLOCK_K": blocks.block_k, "BLOCK_R": blocks.block_r},
                num_stages=blocks.shrink_stages,
            )
            specs += on_every_sm(
                _expand_kernel,
                expand,
                blocks.expand_warps,
                sizes | {"PIECES": MAX_PIECES, "BLOCK_N": blocks.block_n, "BLOCK_R": BLOCK_R},
            )
    return specs
