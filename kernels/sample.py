"""The next token of each row: one pass over its logits in tiles, then one program per row.

Math     per tile: cap → bias, penalties, min_tokens → grammar → temperature → Gumbel noise → argmax; Σ exp of
         the capped logits for log probabilities. Merely greedy rows compare uncapped logits. Rows with top-k,
         top-p or min-p leave the maxima of every SUB scores, and draw in the second kernel.
Grid     (row r, tile of the vocabulary, then tiles of the row's entries); then (row r)
Merge    in the order of the tiles: a row's token depends on nothing but its logits and state. Equal scores:
         the lowest id. No [R, V] temporary: 4 V / SUB bytes a row. Traffic: R · V logits once
Same     tokens as sampler.Sampler from the same logits: greedy ones exactly; drawn ones unless two scores are
         closer than fp32's tanh, exp and log differ (scores.py, noise.py and truncation.py say how far). Ties
         of rounded logits are settled by fp32 dot products, for the MAX_TIES lowest ids.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm
from cabochon.kernels.noise import gumbel, noise_key
from cabochon.kernels.sampling_state import BOUND, GRAMMAR, GREEDY, LOGPROBS, TRUNCATED, SamplingState
from cabochon.kernels.scores import open_row, read_logits, scored, softcapped
from cabochon.kernels.truncation import MASS_UNIT, best_of, draw_truncated

MAX_TIES = tl.constexpr(64)
NUM_ACTIVE = 64  # sub-tiles whose scores make the head of a truncated row

BLOCK_PASS = 1024  # positions at once in a pass over a whole row: more spills registers
ROW_WARPS = 8  # 16 spill 8 bytes


class Tiling(NamedTuple):
    """vocab_tile: positions per program, 8 a thread. sub: positions behind one maximum. Powers of two."""

    vocab_tile: int = 2048  # 4096 takes 231 registers a thread on sm_90, which leaves one program to an SM
    sub: int = 64


class SampleOutputs(NamedTuple):
    """Of R rows. token_ids: [R] int32, −1 for padding, for rows that are not finite or may have no token.

    is_finite: [R] bool, False if a logit is NaN or the largest is infinite. logprobs: [R] fp32, of the chosen
    token under the capped logits as given (rounded ones are not made exact), where the row wants them.
    """

    token_ids: Tensor
    is_finite: Tensor
    logprobs: Tensor


class SampleBuffers:
    """Scratch and outputs for up to `max_rows` rows, allocated once."""

    def __init__(self, max_rows: int, state: SamplingState, tiling: Tiling | None = None) -> None:
        """One set serves all graph sizes up to max_rows."""
        device = state.ints.device
        self.tiling = tiling or Tiling()
        self.num_dense_tiles = triton.cdiv(state.vocab_size, self.tiling.vocab_tile)
        self.num_tiles = self.num_dense_tiles + triton.cdiv(state.max_entries, self.tiling.vocab_tile)
        self.num_subs = self.num_tiles * (self.tiling.vocab_tile // self.tiling.sub)
        self.stats = torch.empty((max_rows, 5, self.num_tiles), dtype=torch.float32, device=device)
        self.tile_ids = torch.empty((max_rows, self.num_tiles), dtype=torch.int32, device=device)
        self.sub_maxima = torch.empty((max_rows, self.num_subs), dtype=torch.float32, device=device)
        self.active = torch.empty((max_rows, NUM_ACTIVE), dtype=torch.int32, device=device)
        self.outputs = SampleOutputs(
            torch.full((max_rows,), -1, dtype=torch.int32, device=device),
            torch.zeros(max_rows, dtype=torch.bool, device=device),
            torch.zeros(max_rows, dtype=torch.float32, device=device),
        )


class ExactLogits(NamedTuple):
    """What settles ties of rounded logits. hidden: [R, E] after the final norm. head: [V, E]."""

    hidden: Tensor
    head: Tensor


def sample(
    logits: Tensor,
    row_ids: Tensor,
    state: SamplingState,
    num_tokens: Tensor,
    num_prompt: Tensor,
    softcap: float | None,
    buffers: SampleBuffers,
    exact: ExactLogits | None = None,
) -> SampleOutputs:
    """Choose a token for each row.

    logits: [R, V], not softcapped, any float dtype, contiguous rows. row_ids: [R] int32, −1 for padding.
    num_tokens, num_prompt: [max_seqs] int32, before the new token: the first is the noise's position.
    Returns views of the buffers, overwritten by the next call. Raises ValueError if shapes disagree.
    """
    R, V = logits.shape
    if state.vocab_size != V or row_ids.shape != (R,) or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [R, V] = [{len(row_ids)}, {state.vocab_size}] with contiguous rows, "
            f"got {list(logits.shape)}"
        )
    if len(buffers.stats) < R:
        raise ValueError(f"buffers hold {len(buffers.stats)} rows, got {R}")
    b, tile = buffers, buffers.tiling.vocab_tile
    inputs = (
        logits, row_ids, state.floats, state.doubles, state.ints, state.seeds, num_tokens, num_prompt,
        state.num_entries, state.entry_ids, state.entry_bias, state.entry_counts, state.entry_marks,
        state.entry_bits, state.allowed_bits,
        logits.stride(0), state.entry_ids.stride(0), state.entry_bits.stride(0), softcap or 1.0, V,
    )  # fmt: skip
    constants = {"HAS_CAP": softcap is not None, "BLOCK_V": tile, "SUB": b.tiling.sub}
    _tile_kernel[(R, b.num_tiles)](
        *inputs, b.stats, b.tile_ids, b.sub_maxima, b.num_dense_tiles, b.num_tiles, **constants,
        num_warps=min(max(tile // 256, 1), 8), enable_fp_fusion=False,
    )  # fmt: skip
    hidden, head = (logits, logits) if exact is None else exact
    outputs = SampleOutputs(*(output[:R] for output in b.outputs))
    _row_kernel[(R,)](
        *inputs, b.stats, b.tile_ids, b.sub_maxima, b.active, *outputs, hidden, head,
        hidden.stride(0), head.stride(0), hidden.shape[1], b.num_dense_tiles, b.num_tiles,
        HAS_EXACT=exact is not None, NUM_ACTIVE=NUM_ACTIVE, BLOCK_PASS=BLOCK_PASS, **constants,
        BLOCK_T=triton.next_power_of_2(b.num_tiles), BLOCK_SUBS=triton.next_power_of_2(b.num_subs),
        BLOCK_E=triton.next_power_of_2(hidden.shape[1]) if exact is not None else 1,
        num_warps=ROW_WARPS, enable_fp_fusion=False,  # fused multiply-adds would not give torch's bits
    )  # fmt: skip
    return outputs


@triton.jit
def _claims(row, ints_ptr, num_tokens_ptr, num_prompt_ptr):
    """Returns (flags, position, whether min_tokens is behind, whether the row is merely greedy)."""
    flags = tl.load(ints_ptr + row * 3)
    position = tl.load(num_tokens_ptr + row)
    is_free = (position - tl.load(num_prompt_ptr + row) >= tl.load(ints_ptr + row * 3 + 2)).to(tl.int32)
    is_plain = ((flags & (GREEDY | BOUND | GRAMMAR)) == GREEDY) & (is_free != 0)
    return flags, position, is_free, is_plain


@triton.jit
def _tile_kernel(
    logits_ptr, row_ids_ptr, floats_ptr, doubles_ptr, ints_ptr, seeds_ptr, num_tokens_ptr, num_prompt_ptr,
    num_entries_ptr, entry_ids_ptr, entry_bias_ptr, entry_counts_ptr, entry_marks_ptr,
    entry_bits_ptr, allowed_bits_ptr, logits_stride, entries_stride, bits_stride, cap, V,
    stats_ptr, tile_ids_ptr, sub_maxima_ptr, num_dense_tiles, num_tiles,
    HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    r, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)  # int64: R · V can pass 2^31
    row_id = tl.load(row_ids_ptr + r).to(tl.int64)
    if row_id < 0:
        return
    flags, position, is_free, is_plain = _claims(row_id, ints_ptr, num_tokens_ptr, num_prompt_ptr)
    num_entries = tl.where(is_plain, 0, tl.load(num_entries_ptr + row_id))
    num_dense = num_dense_tiles * BLOCK_V
    stat_ptr = stats_ptr + r * 5 * num_tiles + tile
    id_ptr = tile_ids_ptr + r * num_tiles + tile
    sub_ptr = sub_maxima_ptr + (r * num_tiles + tile) * (BLOCK_V // SUB) + tl.arange(0, BLOCK_V // SUB)
    is_dense = tile < num_dense_tiles
    if (is_dense == 0) & ((tile - num_dense_tiles) * BLOCK_V >= num_entries):
        nothing = float("-inf")
        _store_stats(stat_ptr, id_ptr, num_tiles, 0, nothing, nothing, nothing, 0.0, 0.0)
        tl.store(sub_ptr, tl.full([BLOCK_V // SUB], float("-inf"), tl.float32))
        return
    row = open_row(
        row_id, logits_ptr + r * logits_stride, floats_ptr, entry_ids_ptr, entry_bias_ptr, entry_counts_ptr,
        entry_marks_ptr, entry_bits_ptr, allowed_bits_ptr, entries_stride, bits_stride, num_entries, flags,
        is_free, cap, V, num_dense,
    )  # fmt: skip
    p = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    ids, exists, x = read_logits(p, row)
    has_nan = tl.max((x != x).to(tl.int32), axis=0) != 0
    x = tl.where(x == x, x, float("-inf"))
    raw = tl.where(has_nan, float("nan"), tl.max(x, axis=0))
    raw = tl.where(is_dense, raw, float("-inf"))
    largest = float("-inf")
    total = 0.0
    mass = 0.0
    scores = x
    if ((flags & LOGPROBS) != 0) | (is_plain == 0):
        y = softcapped(x, cap, HAS_CAP)
        if ((flags & LOGPROBS) != 0) & is_dense:
            largest, total = _exp_sum(tl.where(exists, y, float("-inf")))
        if is_plain == 0:
            scores = scored(y, p, ids, exists, row)
            if (flags & TRUNCATED) != 0:
                tl.store(sub_ptr, tl.max(tl.reshape(scores, [BLOCK_V // SUB, SUB]), axis=1))
                _, mass = _exp_sum(scores)
            elif (flags & GREEDY) == 0:
                scores += gumbel(noise_key(tl.load(seeds_ptr + row_id), position), ids)
    best_id, best = best_of(scores, ids)
    _store_stats(
        stat_ptr, tile_ids_ptr + r * num_tiles + tile, num_tiles, best_id, best, raw, largest, total, mass
    )


@triton.jit
def _store_stats(stat_ptr, id_ptr, num_tiles, best_id, best, raw, largest, total, mass):
    tl.store(id_ptr, best_id)
    tl.store(stat_ptr, best)
    tl.store(stat_ptr + num_tiles, raw)
    tl.store(stat_ptr + 2 * num_tiles, largest)
    tl.store(stat_ptr + 3 * num_tiles, total)
    tl.store(stat_ptr + 4 * num_tiles, mass)


@triton.jit
def _exp_sum(x):
    """Returns (max, Σ exp(x − max)); 0 if all are −inf."""
    largest = tl.max(x, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp(x - shift), axis=0)


@triton.jit
def _merged_sum(largest, total):
    """Tiles' (max, Σ exp(x − max)) to (max, Σ) of all."""
    most = tl.max(largest, axis=0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    return most, tl.sum(total * tl.exp(largest - shift), axis=0)


@triton.jit
def _row_kernel(
    logits_ptr, row_ids_ptr, floats_ptr, doubles_ptr, ints_ptr, seeds_ptr, num_tokens_ptr, num_prompt_ptr,
    num_entries_ptr, entry_ids_ptr, entry_bias_ptr, entry_counts_ptr, entry_marks_ptr,
    entry_bits_ptr, allowed_bits_ptr, logits_stride, entries_stride, bits_stride, cap, V,
    stats_ptr, tile_ids_ptr, sub_maxima_ptr, active_ptr, token_ids_ptr, is_finite_ptr, logprobs_ptr,
    hidden_ptr, head_ptr, hidden_stride, head_stride, E, num_dense_tiles, num_tiles,
    HAS_CAP: tl.constexpr, HAS_EXACT: tl.constexpr, NUM_ACTIVE: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_PASS: tl.constexpr, SUB: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_SUBS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)  # int64: R · V can pass 2^31
    row_id = tl.load(row_ids_ptr + r).to(tl.int64)
    tl.store(token_ids_ptr + r, -1)
    tl.store(is_finite_ptr + r, False)
    if row_id < 0:
        return
    flags, position, is_free, is_plain = _claims(row_id, ints_ptr, num_tokens_ptr, num_prompt_ptr)
    t = tl.arange(0, BLOCK_T)
    stat_ptr, valid = stats_ptr + r * 5 * num_tiles + t, t < num_tiles
    raw = tl.load(stat_ptr + num_tiles, mask=valid, other=float("-inf"))
    is_finite = (tl.max((raw != raw).to(tl.int32), axis=0) == 0) & (
        tl.abs(tl.max(raw, axis=0)) < float("inf")
    )
    tl.store(is_finite_ptr + r, is_finite)
    tile_best = tl.load(stat_ptr, mask=valid, other=float("-inf"))
    token_id, best = best_of(
        tile_best, tl.load(tile_ids_ptr + r * num_tiles + t, mask=valid, other=0x7FFFFFFF)
    )
    if (is_finite == 0) | (best == float("-inf")):
        return
    row_logits_ptr = logits_ptr + r * logits_stride
    if is_plain:
        if HAS_EXACT:
            token_id = _settle_ties(
                row_logits_ptr, best, stats_ptr + r * 5 * num_tiles, hidden_ptr + r * hidden_stride, head_ptr,
                head_stride, E, V, num_dense_tiles, BLOCK_V, BLOCK_E,
            )  # fmt: skip
    elif (flags & TRUNCATED) != 0:
        num_entries, num_dense = tl.load(num_entries_ptr + row_id), num_dense_tiles * BLOCK_V
        row = open_row(
            row_id, row_logits_ptr, floats_ptr, entry_ids_ptr, entry_bias_ptr, entry_counts_ptr,
            entry_marks_ptr, entry_bits_ptr, allowed_bits_ptr, entries_stride, bits_stride, num_entries,
            flags, is_free, cap, V, num_dense,
        )  # fmt: skip
        _, mass = _merged_sum(tile_best, tl.load(stat_ptr + 4 * num_tiles, mask=valid, other=0.0))
        num_subs = num_tiles * (BLOCK_V // SUB)
        token_id = draw_truncated(
            row, noise_key(tl.load(seeds_ptr + row_id), position), sub_maxima_ptr + r * num_subs,
            active_ptr + r * NUM_ACTIVE, best, (mass.to(tl.float64) * MASS_UNIT).to(tl.int64),
            tl.load(ints_ptr + row_id * 3 + 1), tl.load(doubles_ptr + row_id * 2),
            tl.load(doubles_ptr + row_id * 2 + 1), num_subs, num_dense + num_entries,
            SUB, NUM_ACTIVE, BLOCK_SUBS, BLOCK_PASS, HAS_CAP,
        )  # fmt: skip
    tl.store(token_ids_ptr + r, token_id)
    if (flags & LOGPROBS) != 0:
        largest = tl.load(stat_ptr + 2 * num_tiles, mask=valid, other=float("-inf"))
        largest, total = _merged_sum(largest, tl.load(stat_ptr + 3 * num_tiles, mask=valid, other=0.0))
        chosen = softcapped(tl.load(row_logits_ptr + token_id).to(tl.float32), cap, HAS_CAP)
        tl.store(logprobs_ptr + r, (chosen - largest) - tl.log(total))


@triton.jit
def _settle_ties(
    logits_ptr, best, tile_best_ptr, hidden_ptr, head_ptr, head_stride, E, V, num_dense_tiles,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Among tokens that share the rounded maximum, the largest fp32 dot product, then the lowest id."""
    e = tl.arange(0, BLOCK_E)
    hidden = tl.load(hidden_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    chosen = tl.full([], 0x7FFFFFFF, tl.int32)
    most = tl.full([], float("-inf"), tl.float32)
    num_seen = 0
    for tile in range(0, num_dense_tiles):
        if (tl.load(tile_best_ptr + tile) == best) & (num_seen < MAX_TIES):
            ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
            token_id = tl.min(tl.where(x == best, ids, 0x7FFFFFFF), axis=0)
            while (token_id < 0x7FFFFFFF) & (num_seen < MAX_TIES):
                head = tl.load(head_ptr + token_id.to(tl.int64) * head_stride + e, mask=e < E, other=0.0)
                value = tl.sum(hidden * head.to(tl.float32), axis=0)
                chosen = tl.where((value > most) | (num_seen == 0), token_id, chosen)
                most = tl.where((value > most) | (num_seen == 0), value, most)
                num_seen += 1
                token_id = tl.min(tl.where((x == best) & (ids > token_id), ids, 0x7FFFFFFF), axis=0)
    return chosen


def compile_specs() -> list[CompileSpec]:
    """A vocabulary of 256,000 in bf16, Gemma 2 with exact ties and Gemma 3 without."""
    inputs = (
        "*bf16", "*i32", "*fp32", "*fp64", "*i32", "*i64", "*i32", "*i32", "*i32", "*i32", "*fp32", "*i32",
        "*i32", "*i32", "*i32", "i32", "i32", "i32", "fp32", "i32",
    )  # fmt: skip
    scratch = ("*fp32", "*i32", "*fp32")
    tiles = (*inputs, *scratch, "i32", "i32")
    rows = (*inputs, *scratch, "*i32", "*i32", "*i1", "*fp32", "*bf16", "*bf16", *["i32"] * 5)
    tile, specs = Tiling(), []
    for is_gemma2 in (True, False):
        shared = {"HAS_CAP": is_gemma2, "BLOCK_V": tile.vocab_tile, "SUB": tile.sub}
        specs += on_every_sm(_tile_kernel, tiles, 8, shared, has_fp_fusion=False)
        own = {
            "HAS_EXACT": is_gemma2, "NUM_ACTIVE": NUM_ACTIVE, "BLOCK_PASS": BLOCK_PASS, "BLOCK_T": 256,
            "BLOCK_SUBS": 8192, "BLOCK_E": 4096 if is_gemma2 else 1,
        }  # fmt: skip
        specs += on_every_sm(_row_kernel, rows, ROW_WARPS, shared | own, has_fp_fusion=False)
    return specs
