"""The memory behind the page pool: K and V tensors, one pair per place in a layer group.

fp8 pages hold e4m3 and a scale per (token, KV head): a head's values are its scale times what the page has.
Scales of their own per token let a page be written token by token, with no second look at what it held.
"""

import mmap
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.engine.kv_layout import KVLayout
from cabochon.engine.models.config import ModelConfig

FP8 = torch.float8_e4m3fn


class LayerPages(NamedTuple):
    """A layer's group. k, v: [N + 1, P, Hkv, D]. k_scales, v_scales: [N + 1, P, Hkv] fp32, of fp8 pages."""

    group: int
    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None


class KVPages:
    """k[i], v[i]: [N + 1, P, Hkv, D] for place i of a group; page 0 is the null page and stays zero.

    k_scales[i], v_scales[i]: [N + 1, P, Hkv] fp32 of fp8 pages, empty lists otherwise.
    """

    def __init__(
        self, model: ModelConfig, layout: KVLayout, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_pages + 1, layout.page_tokens, model.num_kv_heads, model.head_dim)
        places = range(layout.layers_per_group)
        scaled = places if dtype == FP8 else range(0)
        self.layout = layout
        self.k = [_zeros(shape, dtype, device) for _ in places]
        self.v = [_zeros(shape, dtype, device) for _ in places]
        self.k_scales = [_zeros(shape[:3], torch.float32, device) for _ in scaled]
        self.v_scales = [_zeros(shape[:3], torch.float32, device) for _ in scaled]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, the null page and the scales included."""
        return sum(part.nbytes for part in (*self.k, *self.v, *self.k_scales, *self.v_scales))

    def of_layer(self, layer: int) -> LayerPages:
        """The layer's group, its K and V pages and their scales."""
        group, index = self.layout.place[layer]
        scales = (self.k_scales[index], self.v_scales[index]) if self.k_scales else (None, None)
        return LayerPages(group, self.k[index], self.v[index], *scales)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On CPU straight from the kernel: resident memory grows as pages are first used.

    torch.zeros writes all of it, which for 2 GiB takes 1.5 s of the start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
