"""The `flash-attn` backend: FlashAttention 2 on our pages, for GPUs where `flash_probe` finds it.

Decodes and prefills are calls of their own, whatever shares the step. The library chooses how it splits keys
from the batch and the longest sequence: unlike the other backends', a row's bits depend on who shares a step.
"""

from dataclasses import dataclass

import numpy as np
import torch

# An optional package: make_attention imports this file only where the backend was chosen
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.attention import (
    Attention,
    AttentionInputs,
    Move,
    mover,
    positions_of,
    slots_of,
    write_kv,
)
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows

Window = tuple[int, int]  # keys seen to the left and to the right of a query's own, both inclusive
UNBOUNDED: Window = (-1, -1)


@dataclass(frozen=True, slots=True)
class Part:
    """The sequences of one call, and what differs between layer groups.

    page_tables: per group [S, M] int32, as wide as the longest of these sequences needs
    windows:     per group
    """

    page_tables: list[Tensor]
    windows: list[Window]


@dataclass(frozen=True, slots=True)
class Decodes(Part):
    """S sequences of one token. seq_lens: [S] int32, keys, this step's included."""

    seq_lens: Tensor


@dataclass(frozen=True, slots=True)
class Prefills(Part):
    """S sequences of max_q tokens or fewer, with max_k keys or fewer.

    cu_seqlens_q, cu_seqlens_k: [S + 1] int32, from 0: tokens of the step, and keys, this step's included
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, slots=True)
class FlashInputs(AttentionInputs):
    """The step's two calls. None: there is nothing for it, and the library takes no empty batch."""

    decodes: Decodes | None
    prefills: Prefills | None


class FlashAttention(Attention[FlashInputs]):
    """K and V are written to pages first and all keys are read from there, as in the other backends."""

    def __init__(self, model: ModelConfig, pages: KVPages) -> None:
        self._scale = model.attention_scale
        self._softcap = model.attention_softcap or 0.0  # the library's word for none
        self._pages = pages
        self._move = mover(pages.k[0].device)

    def prepare(self, plan: Plan, rows: Rows, move: Move | None = None) -> FlashInputs:
        move = move or self._move
        positions = positions_of(plan)
        return FlashInputs(
            positions=move(positions),
            slots=slots_of(plan, rows, positions, move),
            decodes=self._decodes(plan, rows, move) if plan.num_decodes else None,
            prefills=self._prefills(plan, rows, move) if plan.num_decodes < len(plan.rows) else None,
        )

    def _decodes(self, plan: Plan, rows: Rows, move: Move) -> Decodes:
        ends = plan.starts[: plan.num_decodes] + 1
        tables, windows = self._part(rows, plan.rows[: plan.num_decodes], int(ends.max()), move)
        return Decodes(tables, windows, move(ends.astype(np.int32)))

    def _prefills(self, plan: Plan, rows: Rows, move: Move) -> Prefills:
        lens, starts = plan.lens[plan.num_decodes :], plan.starts[plan.num_decodes :]
        ends = starts + lens
        longest = int(ends.max())
        tables, windows = self._part(rows, plan.rows[plan.num_decodes :], longest, move)
        cu_q, cu_k = (move(np.cumsum([0, *counts], dtype=np.int32)) for counts in (lens, ends))
        return Prefills(tables, windows, cu_q, cu_k, int(lens.max()), longest)

    def _part(
        self, rows: Rows, row_ids: NDArray[np.intp], longest: int, move: Move
    ) -> tuple[list[Tensor], list[Window]]:
        """Tables and windows of sequences of up to `longest` keys."""
        width = -(-longest // rows.page_tokens)  # splits of decodes are shares of the table's width
        tables = [move(table[row_ids, :width]) for table in rows.page_tables]
        return tables, [_window(window, longest) for window in self._pages.layout.windows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: FlashInputs) -> Tensor:
        group, k_pages, v_pages, *_ = self._pages.of_layer(layer)
        write_kv(k_pages, v_pages, k, v, inputs.slots[group])
        num_decodes = 0 if inputs.decodes is None else len(inputs.decodes.seq_lens)
        num_tokens = len(inputs.positions)
        outs = []
        if inputs.decodes is not None:
            outs.append(self._decode(q[:num_decodes], k_pages, v_pages, inputs.decodes, group))
        if inputs.prefills is not None:  # without padding: in a batch of one token each, q alone says T
            outs.append(self._prefill(q[num_decodes:num_tokens], k_pages, v_pages, inputs.prefills, group))
        if num_tokens < len(q) or not outs:
            outs.append(torch.zeros_like(q[num_tokens:]))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, part: Decodes, group: int) -> Tensor:
        """q: [S, Hq, D]. Returns [S, Hq, D]."""
        out: Tensor = flash_attn_with_kvcache(
            q[:, None],  # [S, 1, Hq, D]
            k_pages,
            v_pages,
            cache_seqlens=part.seq_lens,
            block_table=part.page_tables[group],
            softmax_scale=self._scale,
            causal=True,
            window_size=part.windows[group],
            softcap=self._softcap,
        )
        return out[:, 0]

    def _prefill(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, part: Prefills, group: int) -> Tensor:
        """q: [T, Hq, D], the prefills' tokens. Returns [T, Hq, D]."""
        out: Tensor = flash_attn_varlen_func(
            q,
            k_pages,
            v_pages,
            cu_seqlens_q=part.cu_seqlens_q,
            cu_seqlens_k=part.cu_seqlens_k,
            max_seqlen_q=part.max_q,
            max_seqlen_k=part.max_k,
            softmax_scale=self._scale,
            causal=True,
            window_size=part.windows[group],
            softcap=self._softcap,
            block_table=part.page_tables[group],
        )
        return out


def _window(window: int | None, longest: int) -> Window:
    """q - W < k <= q: the mask is aligned to each sequence's last key, and causal bounds the right side.

    None where it hides nothing: only without one does the library let query heads share their keys' reads.
    """
    return UNBOUNDED if window is None or window >= longest else (window - 1, 0)
