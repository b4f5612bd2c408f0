"""Adapters on a CPU with the C kernels: each as large as it is, and one call for each linear layer."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.adapters.adapter import PARTS, Adapter, LinearName, linear_shapes
from cabochon.engine.adapters.deltas import AdapterWeights, StepDeltas
from cabochon.engine.attention import Move
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.rows import NO_ADAPTER
from cabochon.kernels.lora_definition import lora_tiles
from cabochon.kernels.native.lora import NativeLora, NativeLoraWeights, add_lora

TILE_ROWS = 16  # of one adapter: a unit of work


class NativeAdapterWeights(AdapterWeights):
    """For a model that can_run_native."""

    def __init__(self, model: ModelConfig, num_slots: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._layers: list[dict[LinearName, NativeLoraWeights]] = [
            {
                name: NativeLoraWeights(num_slots, shape.k, shape.part_ends, dtype)
                for name, shape in linear_shapes(model).items()
            }
            for _ in range(model.num_layers)
        ]

    def put(self, slot: int, adapter: Adapter | None) -> None:
        for index, layer in enumerate(self._layers):
            deltas = {} if adapter is None else adapter.layers[index]
            for name, weights in layer.items():
                delta = deltas.get(name)
                if adapter is None or delta is None:
                    weights.put(slot, None)
                    continue
                a = delta.a.view(len(PARTS[name]), adapter.rank, -1).to(self._dtype).contiguous()
                weights.put(slot, NativeLora(a, delta.b.t().to(self._dtype).contiguous()))

    def step(
        self, slots: NDArray[np.int32], lens: NDArray[np.int32], num_rows: int, move: Move | None = None
    ) -> StepDeltas | None:
        if (slots == NO_ADAPTER).all():
            return None
        return _NativeDeltas(self._layers, torch.from_numpy(lora_tiles(slots, lens, TILE_ROWS)))


class _NativeDeltas(StepDeltas):
    def __init__(self, layers: list[dict[LinearName, NativeLoraWeights]], tiles: Tensor) -> None:
        self._layers = layers
        self._tiles = tiles

    def add(self, layer: int, name: LinearName, x: Tensor, out: Tensor) -> None:
        add_lora(x, self._layers[layer][name], self._tiles, out=out)
