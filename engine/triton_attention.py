"""The `triton` backend: decodes and prefills on kernels of their own, whatever shares the step.

Also runs in Triton's interpreter, on CPU tensors, which is how tests compare it with the `torch` backend.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
from cabochon.kernels.decode_attention import decode_attention
from cabochon.kernels.prefill_attention import prefill_attention
from cabochon.kernels.qkv_rope_write import quantize_heads


@dataclass(frozen=True, slots=True)
class TritonInputs(AttentionInputs):
    """Decodes are the first num_decodes sequences, one token each.

    page_tables:  per group [S, M] int32
    seq_lens:     [S] int32, keys of each sequence, this step's included
    cu_seqlens_q: [S - num_decodes + 1] int32, first tokens of the prefills; starts at num_decodes
    """

    page_tables: list[Tensor]
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    num_decodes: int


class TritonAttention(Attention[TritonInputs]):
    """Both kernels read all keys from pages, those of this step too.

    A model that writes K and V itself (models/fused.py) uses pages_of and attend_pages, others use attend.
    """

    def __init__(self, model: ModelConfig, pages: KVPages) -> None:
        self._model = model
        self._pages = pages
        self._move = mover(pages.k[0].device)

    def prepare(self, plan: Plan, rows: Rows, move: Move | None = None) -> TritonInputs:
        move = move or self._move
        positions = positions_of(plan)
        ends = plan.starts + plan.lens
        # Tables as wide as the longest sequence needs: the decode kernel's grid follows their width
        width = -(-int(ends.max(initial=1)) // rows.page_tokens)
        first = np.cumsum(plan.lens) - plan.lens
        cu_seqlens = np.append(first[plan.num_decodes :], plan.num_tokens).astype(np.int32)
        return TritonInputs(
            positions=move(positions),
            slots=slots_of(plan, rows, positions, move),
            page_tables=[move(table[plan.rows, :width]) for table in rows.page_tables],
            seq_lens=move(ends.astype(np.int32)),
            cu_seqlens_q=move(cu_seqlens),
            num_decodes=plan.num_decodes,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: TritonInputs) -> Tensor:
        """For models that write nothing themselves; no slot may be −1."""
        pages = self._pages.of_layer(layer)
        slots = inputs.slots[pages.group]
        if pages.k_scales is None or pages.v_scales is None:
            write_kv(pages.k, pages.v, k, v, slots)
        else:
            _write_fp8(pages.k, pages.k_scales, k, slots)
            _write_fp8(pages.v, pages.v_scales, v, slots)
        return self.attend_pages(layer, q, inputs)

    def pages_of(self, layer: int) -> LayerPages:
        """Where a model that writes K and V itself puts them, before it calls attend_pages."""
        return self._pages.of_layer(layer)

    def attend_pages(
        self, layer: int, q: Tensor, inputs: TritonInputs, *, out: Tensor | None = None
    ) -> Tensor:
        """Attend to what the pages hold, this step's keys included. No host sync: a CUDA graph may hold it.

        q, out: [T', Hq, D]. Rows of no sequence are zero, or in a given `out` as they are: the caller may
        zero one for all layers. Returns out.
        """
        num_decodes, lens = inputs.num_decodes, inputs.seq_lens
        if out is None:
            out = torch.empty_like(q)
            # How many rows the prefills have is known to the device alone, so theirs are zeroed too. Padding
            # must be finite: what empty memory holds would be multiplied on, and what looks for NaN, find it
            out[num_decodes:].zero_()
        pages = self._pages.of_layer(layer)
        table = inputs.page_tables[pages.group]
        options: dict[str, Any] = {
            "scale": self._model.attention_scale,
            "softcap": self._model.attention_softcap,
            "window": self._pages.layout.windows[pages.group],
            "k_scales": pages.k_scales,
            "v_scales": pages.v_scales,
        }
        if num_decodes:
            decode = slice(num_decodes)
            decode_attention(
                q[decode], pages.k, pages.v, table[decode], lens[decode], out=out[decode], **options
            )
        if num_decodes < len(lens):
            prefill = slice(num_decodes, None)
            prefill_attention(
                q, pages.k, pages.v, table[prefill], inputs.cu_seqlens_q, lens[prefill], out=out, **options
            )
        return out


def _write_fp8(pages: Tensor, scales: Tensor, x: Tensor, slots: Tensor) -> None:
    """x: [T', Hkv, D], of which the first T go to slots [T] of pages [N, P, Hkv, D], scales [N, P, Hkv]."""
    values, factors = quantize_heads(x[: len(slots)])
    rows = pages.view(torch.uint8).flatten(0, 1)  # index_copy_ does not know e4m3
    rows.index_copy_(0, slots, values.view(torch.uint8))
    scales.flatten(0, 1).index_copy_(0, slots, factors)
