"""What adapters add to the linear layers of a step, and where their weights are for it: `torch`, any device.

The GPU's is in `triton_deltas`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.adapters.adapter import PARTS, Adapter, LinearName, LinearShape, linear_shapes
from cabochon.engine.attention import Move, mover
from cabochon.engine.linear import ROW_MULTIPLE, Linear
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.rows import NO_ADAPTER


class StepDeltas(ABC):
    """Adds the adapters of one step's tokens."""

    @abstractmethod
    def add(self, layer: int, name: LinearName, x: Tensor, out: Tensor) -> None:
        """x: [T', k], what the linear layer was given. out: [T', n], what it gave: changed in place."""


class AdapterWeights(ABC):
    """The weights in the slots of a device."""

    row_multiple = 1  # rows of a step on a CPU are padded to it

    @abstractmethod
    def put(self, slot: int, adapter: Adapter | None) -> None:
        """Fill a slot, or empty it. Steps that were launched before still find what was there."""

    @abstractmethod
    def step(
        self, slots: NDArray[np.int32], lens: NDArray[np.int32], num_rows: int, move: Move | None = None
    ) -> StepDeltas | None:
        """For sequences in packed order, their slots and numbers of tokens: [S] each. None: nothing to add.

        num_rows: T', tokens and padding. move: as in Attention.prepare.
        """


class TorchAdapterWeights(AdapterWeights):
    """All adapters that have a slot stand side by side in one matrix: many take no more products than one.

    What a token gets of other adapters is masked. On a CPU a bf16 product takes 16 µs however small it is:
    eight adapters one by one would add half the time of a step (docs/decisions.md).
    """

    row_multiple = ROW_MULTIPLE

    def __init__(self, model: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = linear_shapes(model)
        self._num_layers = model.num_layers
        self._adapters: list[Adapter | None] = [None] * num_slots
        self._dtype, self._device = dtype, device
        self._move = mover(device)
        self._layers: list[dict[LinearName, _Wide]] = []
        self._slot_of_column: NDArray[np.int32] = np.empty(0, np.int32)

    def put(self, slot: int, adapter: Adapter | None) -> None:
        self._adapters[slot] = adapter
        held = [(slot, one) for slot, one in enumerate(self._adapters) if one is not None]
        self._slot_of_column = np.repeat(
            np.array([slot for slot, _ in held], np.int32), [one.rank for _, one in held]
        )
        self._layers = [
            {
                name: self._wide(layer, name, shape, [one for _, one in held])
                for name, shape in self._shapes.items()
                if any(name in one.layers[layer] for _, one in held)
            }
            for layer in range(self._num_layers)
        ]

    def _wide(self, layer: int, name: LinearName, shape: LinearShape, held: Sequence[Adapter]) -> "_Wide":
        num_parts, width = len(PARTS[name]), len(self._slot_of_column)
        a = torch.zeros((num_parts, width, shape.k), dtype=self._dtype, device=self._device)
        b = torch.zeros((shape.n, width), dtype=self._dtype, device=self._device)
        start = 0
        for one in held:
            columns = slice(start, start := start + one.rank)
            if name in one.layers[layer]:
                delta = one.layers[layer][name]
                a[:, columns] = delta.a.view(num_parts, one.rank, shape.k)
                b[:, columns] = delta.b
        starts = (0, *shape.part_ends)
        parts = [slice(start, end) for start, end in zip(starts, shape.part_ends, strict=False)]
        return _Wide(Linear(a.flatten(0, 1)), [(part, Linear(b[part])) for part in parts])

    def step(
        self, slots: NDArray[np.int32], lens: NDArray[np.int32], num_rows: int, move: Move | None = None
    ) -> StepDeltas | None:
        if (slots == NO_ADAPTER).all():
            return None
        slot_of_row = np.full(num_rows, NO_ADAPTER, np.int32)
        slot_of_row[: lens.sum()] = np.repeat(slots, lens)
        is_foreign = slot_of_row[:, None] != self._slot_of_column  # [T', R]
        return _TorchDeltas(self._layers, (move or self._move)(is_foreign))


class _Wide(NamedTuple):
    """A linear layer's products for all adapters, R the sum of their ranks."""

    shrink: Linear  # to [T', P · R]
    expand: list[tuple[slice, Linear]]  # of each part, with its columns of the output


class _TorchDeltas(StepDeltas):
    def __init__(self, layers: Sequence[dict[LinearName, _Wide]], is_foreign: Tensor) -> None:
        """is_foreign: [T', R], whether a column is of another adapter than the row."""
        self._layers = layers
        self._is_foreign = is_foreign

    def add(self, layer: int, name: LinearName, x: Tensor, out: Tensor) -> None:
        wide = self._layers[layer].get(name)
        if wide is None:
            return
        inner = wide.shrink(x).view(len(x), len(wide.expand), -1)  # [T', P, R]
        # Not a product with 0: what another adapter makes of the row may be infinite
        inner.masked_fill_(self._is_foreign[:, None], 0)
        for part, (columns, expand) in enumerate(wide.expand):
            out[:, columns] += expand(inner[:, part])
