"""The `triton` backend: decodes and prefills on kernels of their own, whatever shares the step.

Also runs in Triton's interpreter, on CPU tensors, which is how tests compare it with the `torch` backend.
"""

from typing import Any

import torch
from torch import Tensor

from cabochon.engine.kv_pages import LayerPages
from cabochon.engine.pages_attention import PagesAttention, PagesInputs
from cabochon.kernels.decode_attention import decode_attention
from cabochon.kernels.prefill_attention import prefill_attention
from cabochon.kernels.qkv_rope_write import quantize_heads


class TritonAttention(PagesAttention):
    """Both kernels read all keys from pages, those of this step too."""

    def write(self, pages: LayerPages, k: Tensor, v: Tensor, slots: Tensor) -> None:
        if pages.k_scales is None or pages.v_scales is None:
            super().write(pages, k, v, slots)
        else:
            _write_fp8(pages.k, pages.k_scales, k, slots)
            _write_fp8(pages.v, pages.v_scales, v, slots)

    def attend_pages(
        self, layer: int, q: Tensor, inputs: PagesInputs, *, out: Tensor | None = None
    ) -> Tensor:
        """As PagesAttention's. No host sync: a CUDA graph may hold it."""
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
                q,
                pages.k,
                pages.v,
                table[prefill],
                inputs.cu_seqlens_q[num_decodes:],
                lens[prefill],
                out=out,
                **options,
            )
        return out


def _write_fp8(pages: Tensor, scales: Tensor, x: Tensor, slots: Tensor) -> None:
    """x: [T', Hkv, D], of which the first T go to slots [T] of pages [N, P, Hkv, D], scales [N, P, Hkv]."""
    values, factors = quantize_heads(x[: len(slots)])
    rows = pages.view(torch.uint8).flatten(0, 1)  # index_copy_ does not know e4m3
    rows.index_copy_(0, slots, values.view(torch.uint8))
    scales.flatten(0, 1).index_copy_(0, slots, factors)
