"""Adapters on a GPU: slots with room for the largest rank, and two kernels for each linear layer.

Rows of one adapter stand together in a step, and are cut into tiles on the host: a kernel's program has one
tile and one adapter. No shape depends on who is in the batch, so a CUDA graph may hold all of it.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.adapters.adapter import PARTS, Adapter, LinearName, linear_shapes
from cabochon.engine.adapters.deltas import AdapterWeights, StepDeltas
from cabochon.engine.attention import Move, mover
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.rows import NO_ADAPTER
from cabochon.kernels.lora import add_lora, scratch_words
from cabochon.kernels.lora_definition import LoraWeights, lora_tiles, max_tiles

DECODE_TILE = 16  # rows: the fewest that a product of tensor cores takes
PREFILL_TILE = 64


class TritonAdapterWeights(AdapterWeights):
    """All that a step needs is allocated at the start, at addresses that stay."""

    def __init__(
        self,
        model: ModelConfig,
        num_slots: int,
        max_rank: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """max_rows: T' of any step, at most."""
        self.num_slots = num_slots
        self._max_rank = max_rank
        self._move = mover(device)
        shapes = linear_shapes(model)
        self._layers: list[dict[LinearName, LoraWeights]] = [
            {
                name: LoraWeights(
                    a=torch.zeros(
                        (num_slots, len(PARTS[name]) * max_rank, shape.k), dtype=dtype, device=device
                    ),
                    b=torch.zeros((num_slots, shape.n, max_rank), dtype=dtype, device=device),
                    ranks=torch.zeros(num_slots, dtype=torch.int32, device=device),
                    part_ends=shape.part_ends,
                )
                for name, shape in shapes.items()
            }
            for _ in range(model.num_layers)
        ]
        most_parts = max(map(len, PARTS.values()))
        words = scratch_words(max_rows, most_parts, max_rank)
        self._scratch = torch.empty(words, dtype=torch.float32, device=device)

    def put(self, slot: int, adapter: Adapter | None) -> None:
        for index, layer in enumerate(self._layers):
            deltas = {} if adapter is None else adapter.layers[index]
            for name, weights in layer.items():
                delta = deltas.get(name)
                if adapter is None or delta is None:
                    weights.ranks[slot].fill_(0)
                    continue
                parts, rank = len(PARTS[name]), adapter.rank
                of_slot = weights.a[slot].view(parts, self._max_rank, -1)
                of_slot[:, :rank].copy_(delta.a.view(parts, rank, -1), non_blocking=True)
                weights.b[slot, :, :rank].copy_(delta.b, non_blocking=True)
                weights.ranks[slot].fill_(rank)

    def step(
        self, slots: NDArray[np.int32], lens: NDArray[np.int32], num_rows: int, move: Move | None = None
    ) -> StepDeltas | None:
        if (slots == NO_ADAPTER).all():
            return None
        tile_rows = DECODE_TILE if lens.max() == 1 else PREFILL_TILE
        return self.of_tiles((move or self._move)(lora_tiles(slots, lens, tile_rows)), tile_rows)

    def max_decode_tiles(self, num_rows: int) -> int:
        """Tiles of a pure decode, at most."""
        return max_tiles(num_rows, self.num_slots, DECODE_TILE)

    def decode_tiles(self, slots: NDArray[np.int32], num_tiles: int) -> NDArray[np.int32]:
        """[num_tiles, 3] for a pure decode of sequences with these slots; those beyond its own do nothing."""
        tiles = lora_tiles(slots, np.ones_like(slots), DECODE_TILE)
        return np.pad(tiles, ((0, num_tiles - len(tiles)), (0, 0)), constant_values=NO_ADAPTER)

    def of_tiles(self, tiles: Tensor, tile_rows: int = DECODE_TILE) -> StepDeltas:
        """tiles: [n, 3] int32 on the device, read when the step runs."""
        return _TritonDeltas(self._layers, tiles, tile_rows, self._scratch)


class _TritonDeltas(StepDeltas):
    def __init__(
        self, layers: list[dict[LinearName, LoraWeights]], tiles: Tensor, tile_rows: int, scratch: Tensor
    ) -> None:
        self._layers = layers
        self._tiles = tiles
        self._tile_rows = tile_rows
        self._scratch = scratch

    def add(self, layer: int, name: LinearName, x: Tensor, out: Tensor) -> None:
        add_lora(
            x,
            self._layers[layer][name],
            self._tiles,
            tile_rows=self._tile_rows,
            scratch=self._scratch,
            out=out,
        )
