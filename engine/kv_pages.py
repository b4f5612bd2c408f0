"""The memory behind the page pool: K and V tensors, one pair per place in a layer group."""

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
        # Zeros from the allocator are mapped lazily: resident memory grows as pages are first used.
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.layers_per_group)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.layers_per_group)]

    @property
    def num_bytes(self) -> int:
        return sum(pages.nbytes for pages in (*self.k, *self.v))

    def of_layer(self, layer: int) -> tuple[int, Tensor, Tensor]:
        """The layer's group and its K and V pages."""
        group, index = self.layout.place[layer]
        return group, self.k[index], self.v[index]
