"""The running requests' rows on the device: what the next step needs of them never passes the host.

The host stages what it changes (a new row, a page), and a step applies it before it computes. Sampled tokens
are entered by the step itself. Page tables keep pages that have left a window: nothing reads those.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.arena import Allocate, Arena, RowFields, first_word
from cabochon.engine.packet import Packet
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.engine.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from cabochon.kernels.sampling_state import RowSampling, SamplingState


class DeviceRows:
    """Arrays over max_seqs rows, as in Rows.

    token_ids:   [max_seqs, max_model_len] int32
    num_tokens:  [max_seqs] int32, those that the device knows
    num_prompt:  [max_seqs] int32
    page_tables: [num_groups, max_seqs, M] int32
    """

    def __init__(self, rows: Rows, vocab_size: int, device: torch.device) -> None:
        max_seqs, max_len = rows.token_ids.shape
        self.page_tokens = rows.page_tokens
        max_entries = max_len + MAX_LOGIT_BIAS + MAX_STOP_TOKENS + 8  # the model's own stop tokens

        def make(allocate: Allocate) -> tuple[Tensor, Tensor, Tensor, Tensor, SamplingState]:
            return (
                allocate((max_seqs, max_len), torch.int32),
                allocate((max_seqs,), torch.int32),
                allocate((max_seqs,), torch.int32),
                allocate(rows.page_tables.shape, torch.int32),
                SamplingState(
                    max_seqs=max_seqs, vocab_size=vocab_size, max_entries=max_entries, allocate=allocate
                ),
            )

        self._arena, arrays = Arena.holding(make, device)
        self.token_ids, self.num_tokens, self.num_prompt, self.page_tables, self.sampling = arrays
        self._first_token = first_word(self.token_ids)
        num_groups, *table = rows.page_tables.shape
        self._first_of_group = np.arange(num_groups)[:, None] * np.prod(table)
        self._fields = RowFields([self.num_tokens, self.num_prompt, *self.sampling.fields])
        self._num_sent = np.zeros(max_seqs, np.int32)  # pages of each row that the device has

    def stage_row(self, row: int, ids: NDArray[np.int32], num_prompt: int, sampling: RowSampling) -> None:
        """A request with these known tokens has got this row. At most once per step and row."""
        values, entries = self.sampling.row_values(row, sampling, ids[:num_prompt], ids[num_prompt:])
        self._arena.write_words(self._first_token + row * self.token_ids.shape[1], ids)
        self._arena.write_row(self._fields, row, [len(ids), num_prompt, *values])
        for target, written in entries:
            self._arena.write(target, written)
        self._num_sent[row] = 0

    def stage_pages(self, plan: Plan, rows: Rows) -> None:
        """The pages that this plan is the first to need."""
        needed = (plan.starts + plan.lens + (self.page_tokens - 1)) // self.page_tokens  # [S]
        lacks = needed > self._num_sent[plan.rows]
        if not np.count_nonzero(lacks):  # a third of what .any() takes
            return
        changed, needed = plan.rows[lacks], needed[lacks]  # most rows need no page in a step
        sent, self._num_sent[changed] = self._num_sent[changed], needed
        counts = needed - sent
        places = changed * rows.page_tables.shape[2] + sent  # of the first of each
        if np.count_nonzero(counts > 1):
            places = np.repeat(places - (counts.cumsum() - counts), counts)  # [total]
            places += np.arange(len(places))
        flat = self._first_of_group + places  # [num_groups, total]
        self._arena.write_elements(self.page_tables, flat, rows.page_tables.take(flat))

    def stage_mask(self, row: int, allowed: NDArray[np.bool_]) -> None:
        """allowed: [V], the tokens that the row's grammar allows next."""
        bits = np.zeros(self.sampling.allowed_bits.shape[1] * 32, np.bool_)
        bits[: len(allowed)] = allowed
        self._arena.write(
            self.sampling.allowed_bits[row], np.packbits(bits, bitorder="little").view(np.int32)
        )

    def put_writes(self, packet: Packet) -> tuple[Tensor, Tensor]:
        """All that is staged, for `apply`."""
        places, words = self._arena.take()
        return packet.put(places), packet.put(words)

    def apply(self, writes: tuple[Tensor, Tensor]) -> None:
        """Inside a step's work, after its packet was sent."""
        self._arena.apply(*writes)
