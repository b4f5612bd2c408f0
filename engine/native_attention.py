"""The `native` backend: C on the CPU, the same code for decodes and prefills."""

import torch
from torch import Tensor

from cabochon.engine.pages_attention import PagesAttention, PagesInputs
from cabochon.kernels.native.attention import native_attention


class NativeAttention(PagesAttention):
    """Keys are read where they lie, never gathered; nothing is planned but page tables."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per group; None: all keys are seen."""
        return self._pages.layout.windows

    def attend_pages(
        self, layer: int, q: Tensor, inputs: PagesInputs, *, out: Tensor | None = None
    ) -> Tensor:
        pages = self._pages.of_layer(layer)
        out = torch.zeros_like(q) if out is None else out
        native_attention(
            q.contiguous(), pages.k, pages.v,
            inputs.page_tables[pages.group], inputs.cu_seqlens_q, inputs.seq_lens,
            scale=self._model.attention_scale,
            softcap=self._model.attention_softcap,
            window=self.windows[pages.group],
            out=out,
        )  # fmt: skip
        return out
