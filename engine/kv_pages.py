"""The memory behind the page pool: K and V tensors, one pair per place in a layer group."""

import mmap
from math import prod

import torch
from torch import Tensor

from cabochon.engine.kv_layout import KVLayout
from cabochon.engine.models.config import ModelConfig


class KVPages:
    """k[i], v[i]: [N + 1, P, Hkv, D] for place i of a group; page 0 is the null page and stays zero."""

    def __init__(
        self, model: ModelConfig, layout: KVLayout, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_pages + 1, layout.page_tokens, model.num_kv_heads, model.head_dim)
        self.layout = layout
        self.k = [_zeros(shape, dtype, device) for _ in range(layout.layers_per_group)]
        self.v = [_zeros(shape, dtype, device) for _ in range(layout.layers_per_group)]

    @property
    def num_bytes(self) -> int:
        return sum(pages.nbytes for pages in (*self.k, *self.v))

    def of_layer(self, layer: int) -> tuple[int, Tensor, Tensor]:
        """The layer's group and its K and V pages."""
        group, index = self.layout.place[layer]
        return group, self.k[index], self.v[index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On CPU straight from the kernel: resident memory grows as pages are first used.

    torch.zeros writes all of it, which for 2 GiB takes 1.5 s of the start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
