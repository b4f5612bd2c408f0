"""The `triton` backend: decodes and prefills on kernels of their own, whatever shares the step.

Also runs in Triton's interpreter, on CPU tensors, which is how tests compare it with the `torch` backend.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.attention import Attention, AttentionInputs, positions_of, slots_of, write_kv
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.decode_attention import decode_attention
from cabochon.kernels.prefill_attention import prefill_attention


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
    """Both kernels read all keys from pages, those of this step too."""

    def __init__(self, model: ModelConfig, pages: KVPages) -> None:
        self._model = model
        self._pages = pages
        self._device = pages.k[0].device

    def prepare(self, plan: Plan, rows: Rows) -> TritonInputs:
        positions = positions_of(plan)
        ends = plan.starts + plan.lens
        # Tables as wide as the longest sequence needs: the decode kernel's grid follows their width
        width = -(-int(ends.max(initial=1)) // rows.page_tokens)
        first = np.cumsum(plan.lens) - plan.lens
        cu_seqlens = np.append(first[plan.num_decodes :], plan.num_tokens).astype(np.int32)
        return TritonInputs(
            positions=self._moved(positions),
            slots=slots_of(plan, rows, positions, self._device),
            page_tables=[self._moved(table[plan.rows, :width]) for table in rows.page_tables],
            seq_lens=self._moved(ends.astype(np.int32)),
            cu_seqlens_q=self._moved(cu_seqlens),
            num_decodes=plan.num_decodes,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: TritonInputs) -> Tensor:
        group, k_pages, v_pages = self._pages.of_layer(layer)
        write_kv(k_pages, v_pages, k, v, inputs.slots[group])
        table, lens, num_decodes = inputs.page_tables[group], inputs.seq_lens, inputs.num_decodes
        out = torch.zeros_like(q)
        if num_decodes:
            decode_attention(
                q[:num_decodes],
                k_pages,
                v_pages,
                table[:num_decodes],
                lens[:num_decodes],
                scale=self._model.attention_scale,
                softcap=self._model.attention_softcap,
                window=self._pages.layout.windows[group],
                out=out[:num_decodes],
            )
        if num_decodes < len(lens):
            prefill_attention(
                q,
                k_pages,
                v_pages,
                table[num_decodes:],
                inputs.cu_seqlens_q,
                lens[num_decodes:],
                scale=self._model.attention_scale,
                softcap=self._model.attention_softcap,
                window=self._pages.layout.windows[group],
                out=out,
            )
        return out

    def _moved(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
