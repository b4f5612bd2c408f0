"""Backends whose kernels find keys through page tables: what a step tells them, and what they share."""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
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
from cabochon.engine.kv_pages import KVPages, LayerPages
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows


@dataclass(frozen=True, slots=True)
class PagesInputs(AttentionInputs):
    """Decodes are the first num_decodes sequences, one token each.

    page_tables:  per group [S, M] int32
    seq_lens:     [S] int32, keys of each sequence, this step's included
    cu_seqlens_q: [S + 1] int32, first tokens of the sequences, and the end of the last
    """

    page_tables: list[Tensor]
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    num_decodes: int


class PagesAttention(Attention[PagesInputs]):
    """A model that writes K and V itself (models/fused.py) uses pages_of and attend_pages, others attend."""

    def __init__(self, model: ModelConfig, pages: KVPages) -> None:
        self._model = model
        self._pages = pages
        self._move = mover(pages.k[0].device)

    def prepare(self, plan: Plan, rows: Rows, move: Move | None = None) -> PagesInputs:
        move = move or self._move
        positions = positions_of(plan)
        ends = plan.starts + plan.lens
        # Tables as wide as the longest sequence needs: the decode kernel's grid follows their width
        width = -(-int(ends.max(initial=1)) // rows.page_tokens)
        cu_seqlens = np.concatenate([[0], np.cumsum(plan.lens)]).astype(np.int32)
        return PagesInputs(
            positions=move(positions),
            slots=slots_of(plan, rows, positions, move),
            page_tables=[move(table[plan.rows, :width]) for table in rows.page_tables],
            seq_lens=move(ends.astype(np.int32)),
            cu_seqlens_q=move(cu_seqlens),
            num_decodes=plan.num_decodes,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: PagesInputs) -> Tensor:
        """For models that write nothing themselves; no slot may be −1."""
        pages = self._pages.of_layer(layer)
        self.write(pages, k, v, inputs.slots[pages.group])
        return self.attend_pages(layer, q, inputs)

    def pages_of(self, layer: int) -> LayerPages:
        """Where a model that writes K and V itself puts them, before it calls attend_pages."""
        return self._pages.of_layer(layer)

    def write(self, pages: LayerPages, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k, v: [T', Hkv, D], of which the first T go to slots [T]."""
        write_kv(pages.k, pages.v, k, v, slots)

    @abstractmethod
    def attend_pages(
        self, layer: int, q: Tensor, inputs: PagesInputs, *, out: Tensor | None = None
    ) -> Tensor:
        """Attend to what the pages hold, this step's keys included.

        q, out: [T', Hq, D]. Rows of no sequence are zero, or in a given `out` as they are: the caller may
        zero one for all layers. Returns out.
        """
