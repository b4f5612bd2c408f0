"""What a step tells the attention of every layer: the `torch` backend, for any device.

`triton` and `flash_attn` will stand beside it behind the same two calls: prepare once a step, attend once a
layer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.kv_pages import KVPages
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.paged_attention import KEY_TILE, Section, paged_attention, plan_sections


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """positions: [T] int64. slots: per group [T] int64, where K and V go (page · P + offset)."""

    positions: Tensor
    slots: list[Tensor]
    sections: list[list[Section]]


class TorchAttention:
    """Writes the step's K and V into pages, then attends through them: chunks, hits and decodes alike."""

    def __init__(self, model: ModelConfig, pages: KVPages) -> None:
        self._model = model
        self._pages = pages
        self._key_tile = max(KEY_TILE, pages.layout.page_tokens)

    def prepare(self, plan: Plan, rows: Rows) -> AttentionInputs:
        """All index work of the step; nothing per layer. Page tables must cover starts + lens."""
        row_of_token = np.repeat(plan.rows, plan.lens)
        first = np.cumsum(plan.lens) - plan.lens
        positions = np.arange(plan.num_tokens) - np.repeat(first - plan.starts, plan.lens)
        page_idx, offsets = np.divmod(positions, rows.page_tokens)
        slots, sections = [], []
        for table, window in zip(rows.page_tables, self._pages.layout.windows, strict=True):
            pages = table[row_of_token, page_idx].astype(np.int64)
            assert pages.all(), "a token has no page"
            slots.append(torch.from_numpy(pages * rows.page_tokens + offsets))
            sections.append(self._sections(plan, table, rows.page_tokens, window))
        return AttentionInputs(torch.from_numpy(positions.astype(np.int64)), slots, sections)

    def _sections(
        self, plan: Plan, table: NDArray[np.int32], page_tokens: int, window: int | None
    ) -> list[Section]:
        return plan_sections(
            plan.starts,
            plan.lens,
            plan.num_decodes,
            table[plan.rows],
            page_tokens=page_tokens,
            num_kv_heads=self._model.num_kv_heads,
            head_dim=self._model.head_dim,
            window=window,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
        """q: [T', Hq, D]. k, v: [T', Hkv, D]. T' ≥ T: rows past T are padding and get zeros.

        Returns [T', Hq, D].
        """
        group, k_pages, v_pages = self._pages.of_layer(layer)
        slots = inputs.slots[group]
        k_pages.view(-1, *k.shape[1:]).index_copy_(0, slots, k[: len(slots)])
        v_pages.view(-1, *v.shape[1:]).index_copy_(0, slots, v[: len(slots)])
        return paged_attention(
            q,
            k_pages,
            v_pages,
            inputs.sections[group],
            scale=self._model.attention_scale,
            softcap=self._model.attention_softcap,
            key_tile=self._key_tile,
        )
