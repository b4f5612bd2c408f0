"""How a model's layers share one page pool: groups of layers of one kind and equal size, a page table each.

A page holds the K and V of `page_tokens` tokens for every layer of its group. Gemma 2 has two groups (as many
sliding layers as global ones), Gemma 3 270M six (five sliding ones of three layers, one global). The idea of
equal groups over one pool is vLLM's (v1/core/kv_cache_utils.py).
"""

from dataclasses import dataclass

from cabochon.engine.models.config import ModelConfig

SCALE_BYTES = 4  # of fp8 pages: an fp32 per token and KV head, for K and for V


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """windows: [num_groups], None for global ones. place: [L], (group, index in the group) of each layer."""

    windows: tuple[int | None, ...]
    place: tuple[tuple[int, int], ...]
    layers_per_group: int
    page_tokens: int
    page_bytes: int

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    def pages_per_sequence(self, num_tokens: int, chunk_tokens: int) -> int:
        """Pages that a sequence of num_tokens holds at most, computed in chunks of at most chunk_tokens."""
        full = -(-num_tokens // self.page_tokens)
        total = 0
        for window in self.windows:
            if window is None:
                total += full
            else:  # the window before a chunk, the chunk, and a page for misalignment
                total += min(full, -(-(window - 1 + chunk_tokens) // self.page_tokens) + 1)
        return total


def kv_layout(model: ModelConfig, page_tokens: int, itemsize: int, *, has_scales: bool = False) -> KVLayout:
    """Cut the layers of `model` into groups.

    itemsize: bytes of one K or V element. has_scales: a page holds a scale per token and KV head, too.
    """
    head_bytes = model.head_dim * itemsize + (SCALE_BYTES if has_scales else 0)
    kinds = [[i for i in range(model.num_layers) if model.is_sliding[i] is kind] for kind in (True, False)]
    size = min(len(layers) for layers in kinds if layers)
    place: dict[int, tuple[int, int]] = {}
    windows: list[int | None] = []
    for layers, window in zip(kinds, (model.window, None), strict=True):
        for start in range(0, len(layers), size):  # the last group may be short: its pages have unused places
            for index, layer in enumerate(layers[start : start + size]):
                place[layer] = (len(windows), index)
            windows.append(window)
    return KVLayout(
        windows=tuple(windows),
        place=tuple(place[layer] for layer in range(model.num_layers)),
        layers_per_group=size,
        page_tokens=page_tokens,
        page_bytes=2 * size * page_tokens * model.num_kv_heads * head_bytes,
    )
