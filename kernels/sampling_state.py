"""What the sampling kernels know of each row: parameters, and tokens whose logits are not the model's alone.

Entries  a row's list of such tokens: biased, seen (if penalties apply), forbidden before min_tokens. A bitmap
         of the same tokens lets the dense pass over the vocabulary leave them out; they are scored from the
         list. So nothing of size V is kept per row but bits.
Grid     note_tokens: one program per sequence looks its new token up in the row's list
The scheduler's thread fills rows at admission; note_tokens keeps the counts as tokens come.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm

GREEDY = tl.constexpr(1)  # flags of a row
BOUND = tl.constexpr(2)  # bias or penalties change its logits
GRAMMAR = tl.constexpr(4)
LOGPROBS = tl.constexpr(8)
TRUNCATED = tl.constexpr(16)  # top-k, top-p or min-p
PENALTIES = tl.constexpr(32)

SEEN = tl.constexpr(1)  # marks of an entry: in the prompt or the output, repetition applies
STOP = tl.constexpr(2)  # forbidden before min_tokens

BLOCK_ENTRIES = 1024
NO_IDS: NDArray[np.int64] = np.empty(0, np.int64)
Ids: TypeAlias = NDArray[np.int32] | NDArray[np.int64]
Allocate: TypeAlias = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How one row's tokens are chosen. The meaning of each value is SamplingParams'."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_ids: Collection[int] = ()
    has_grammar: bool = False
    wants_logprobs: bool = False

    @property
    def has_penalties(self) -> bool:
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0

    def flags(self, vocab_size: int) -> int:
        """The row's flags, packed."""
        is_greedy = self.temperature == 0
        is_truncated = 0 < self.top_k < vocab_size or self.top_p < 1 or self.min_p > 0
        claims = (  # no dict: to hash a constexpr takes longer than all the rest
            (GREEDY, is_greedy),
            (BOUND, bool(self.bias) or self.has_penalties),
            (GRAMMAR, self.has_grammar),
            (LOGPROBS, self.wants_logprobs),
            (TRUNCATED, is_truncated and not is_greedy),
            (PENALTIES, self.has_penalties),
        )
        return sum(int(flag.value) for flag, holds in claims if holds)


class SamplingState:
    """Device arrays over max_seqs rows.

    floats: [max_seqs, 4] fp32, temperature, repetition, presence, frequency. doubles: [max_seqs, 2] fp64,
    top_p and log(min_p). ints: [max_seqs, 3] int32, flags, top_k, min_tokens. seeds: [max_seqs] int64.
    num_entries: [max_seqs] int32. entry_ids, entry_counts (in the output), entry_marks: [max_seqs, A] int32.
    entry_bias: [max_seqs, A] fp32. entry_bits, allowed_bits: [max_seqs, ⌈V / 32⌉] int32, bit i % 32 of word
    i / 32; the second is a grammar's, written by its owner.
    """

    def __init__(
        self, *, max_seqs: int, vocab_size: int, max_entries: int, allocate: Allocate | torch.device
    ) -> None:
        """`max_entries`: A, enough for all distinct tokens of a row, its bias and its stop tokens.

        allocate: gives zeros of a shape and dtype, or the device that has them.
        """

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            if isinstance(allocate, torch.device):
                return torch.zeros((max_seqs, *shape), dtype=dtype, device=allocate)
            return allocate((max_seqs, *shape), dtype)

        self._has_bits = np.zeros(max_seqs, np.bool_)  # else entry_bits are all zero
        self.vocab_size = vocab_size
        self.max_entries = min(max_entries, vocab_size)
        self.floats = zeros(4, dtype=torch.float32)
        self.doubles = zeros(2, dtype=torch.float64)
        self.ints = zeros(3)
        self.seeds = zeros(dtype=torch.int64)
        self.num_entries = zeros()
        self.entry_ids = zeros(self.max_entries)
        self.entry_counts = zeros(self.max_entries)
        self.entry_marks = zeros(self.max_entries)
        self.entry_bias = zeros(self.max_entries, dtype=torch.float32)
        self.entry_bits = zeros(-(-vocab_size // 32))
        self.allowed_bits = zeros(-(-vocab_size // 32))

    def set_row(
        self,
        row: int,
        sampling: RowSampling,
        prompt_ids: Ids = NO_IDS,
        output_ids: Ids = NO_IDS,
    ) -> None:
        """Fill a row at admission, with the tokens that are known by then.

        Raises ValueError if its entries do not fit.
        """
        values, writes = self.row_values(row, sampling, prompt_ids, output_ids)
        rest = iter(values)
        for array in self.fields:
            piece = torch.tensor([*islice(rest, array[row].numel())], dtype=array.dtype)
            array[row] = piece.view_as(array[row])
        for target, entries in writes:
            target.copy_(torch.as_tensor(entries, dtype=target.dtype))

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """What every row has: floats, doubles, ints, seeds, num_entries."""
        return (self.floats, self.doubles, self.ints, self.seeds, self.num_entries)

    def row_values(
        self, row: int, sampling: RowSampling, prompt_ids: Ids = NO_IDS, output_ids: Ids = NO_IDS
    ) -> tuple[list[float], list[tuple[Tensor, NDArray[Any]]]]:
        """The same for who writes many rows at once: numbers for `fields`, and views with entries."""
        s = sampling
        ids, writes = self._entries(row, s, prompt_ids, output_ids)
        log_min_p = math.log(s.min_p) if s.min_p > 0 else -math.inf
        floats = (s.temperature, s.repetition, s.presence, s.frequency, s.top_p, log_min_p)
        ints = (s.flags(self.vocab_size), int(s.top_k), int(s.min_tokens), int(s.seed), len(ids))
        return [*floats, *ints], writes

    def _entries(
        self, row: int, sampling: RowSampling, prompt_ids: Ids, output_ids: Ids
    ) -> tuple[Ids, list[tuple[Tensor, NDArray[Any]]]]:
        if not (sampling.has_penalties or sampling.min_tokens or sampling.bias or self._has_bits[row]):
            return NO_IDS, []  # most rows
        seen = np.concatenate([prompt_ids, output_ids]) if sampling.has_penalties else NO_IDS
        stops = np.array(sorted(sampling.stop_ids), np.int64) if sampling.min_tokens > 0 else NO_IDS
        biased = np.array(list(sampling.bias), np.int64)
        ids = np.unique(np.concatenate([seen, stops, biased]).astype(np.int64))
        if len(ids) > self.max_entries:
            raise ValueError(f"a row may have {self.max_entries} tokens of its own, got {len(ids)}")
        writes: list[tuple[Tensor, NDArray[Any]]] = []
        may_have_bits = len(ids) > 0 or sampling.has_penalties
        if may_have_bits or self._has_bits[row]:
            bits = np.zeros(self.entry_bits.shape[1] * 32, np.bool_)
            bits[ids] = True
            writes.append((self.entry_bits[row], np.packbits(bits, bitorder="little").view(np.int32)))
        self._has_bits[row] = may_have_bits
        if not len(ids):
            return ids, writes
        bias = np.zeros(len(ids), np.float32)
        bias[np.searchsorted(ids, biased)] = list(sampling.bias.values())
        counts = 0 * ids
        if sampling.has_penalties:
            counts = np.bincount(np.searchsorted(ids, output_ids), minlength=len(ids))
        marks = np.isin(ids, seen) * int(SEEN.value) + np.isin(ids, stops) * int(STOP.value)
        first = slice(0, len(ids))
        return ids, [
            *writes,
            (self.entry_ids[row, first], ids),
            (self.entry_bias[row, first], bias),
            (self.entry_counts[row, first], counts),
            (self.entry_marks[row, first], marks),
        ]


def note_tokens(row_ids: Tensor, sampled: Tensor, state: SamplingState) -> None:
    """Count the new tokens of rows that have penalties.

    row_ids: [S] int32, distinct or −1. sampled: [S] int32, below 0 where there is none. A new token that
    finds the list full is not counted: max_entries must not let that happen.
    """
    _note_kernel[(len(row_ids),)](
        row_ids, sampled, state.ints, state.num_entries, state.entry_ids, state.entry_counts,
        state.entry_marks, state.entry_bias, state.entry_bits,
        state.ints.stride(0), state.max_entries, state.entry_bits.stride(0), BLOCK=BLOCK_ENTRIES,
    )  # fmt: skip


@triton.jit
def _note_kernel(
    row_ids_ptr, sampled_ptr, ints_ptr, num_entries_ptr, entry_ids_ptr, entry_counts_ptr, entry_marks_ptr,
    entry_bias_ptr, entry_bits_ptr, ints_stride, max_entries, bits_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.load(row_ids_ptr + tl.program_id(0)).to(tl.int64)  # int64: rows · V / 32 can pass 2^31
    token = tl.load(sampled_ptr + tl.program_id(0))
    if (row < 0) | (token < 0):
        return
    if (tl.load(ints_ptr + row * ints_stride) & PENALTIES) == 0:
        return
    num_entries = tl.load(num_entries_ptr + row)
    first = row * max_entries
    place = num_entries
    for start in range(0, num_entries, BLOCK):
        e = start + tl.arange(0, BLOCK)
        ids = tl.load(entry_ids_ptr + first + e, mask=e < num_entries, other=-1)
        place = tl.minimum(place, tl.min(tl.where(ids == token, e, max_entries), axis=0))
    if place < num_entries:
        count_ptr, marks_ptr = entry_counts_ptr + first + place, entry_marks_ptr + first + place
        tl.store(count_ptr, tl.load(count_ptr) + 1)
        tl.store(marks_ptr, tl.load(marks_ptr) | SEEN)
    elif num_entries < max_entries:
        tl.store(entry_ids_ptr + first + place, token)
        tl.store(entry_counts_ptr + first + place, 1)
        tl.store(entry_marks_ptr + first + place, SEEN)
        tl.store(entry_bias_ptr + first + place, 0.0)
        word_ptr = entry_bits_ptr + row * bits_stride + token // 32
        tl.store(word_ptr, tl.load(word_ptr) | (1 << (token % 32)))
        tl.store(num_entries_ptr + row, num_entries + 1)


def compile_specs() -> list[CompileSpec]:
    """The only configuration."""
    types = (*["*i32"] * 7, "*fp32", "*i32", *["i32"] * 3)
    return on_every_sm(_note_kernel, types, 4, {"BLOCK": BLOCK_ENTRIES})
