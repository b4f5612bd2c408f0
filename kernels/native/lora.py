"""LoRA adapters of a packed batch on top of a linear layer, in C on the CPU: one call for all of a step.

Math     out[t] += B[slot] · (A[slot] · x[t]) for the rows t of a tile; lora_definition.py has it in torch
Traffic  A and B of the adapters in use, once for every four rows of a tile
Bits     a row's depend on the row and its adapter alone
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.library import check, describe, function, how


class NativeLora(NamedTuple):
    """One adapter in one linear layer of P parts: a is [P, rank, K], b is [rank, N], its scale folded in."""

    a: Tensor
    b: Tensor


class NativeLoraWeights:
    """The adapters of one linear layer, in slots; a slot may be empty."""

    def __init__(
        self, num_slots: int, in_features: int, part_ends: Sequence[int], dtype: torch.dtype
    ) -> None:
        """part_ends: as in LoraWeights. Raises ValueError unless they and in_features are multiples of 16."""
        if any(size % LANES for size in (in_features, *part_ends)):
            raise ValueError(f"sizes must be multiples of {LANES}, got {in_features}, {list(part_ends)}")
        self.in_features, self.out_features, self.dtype = in_features, part_ends[-1], dtype
        self.num_parts = len(part_ends)
        self._slots: list[NativeLora | None] = [None] * num_slots  # alive as long as their addresses
        self._part_ends = torch.tensor(part_ends, dtype=torch.int32)
        self._addresses = torch.zeros((2, num_slots), dtype=torch.int64)  # of a and of b
        self._ranks = torch.zeros(num_slots, dtype=torch.int32)
        tables = (*self._addresses, self._ranks, self._part_ends)
        self.tables = [table.data_ptr() for table in tables]  # as the kernel takes them

    def put(self, slot: int, weights: NativeLora | None) -> None:
        """Fill a slot, or empty it. Raises ValueError if shapes or dtype do not fit."""
        if weights is not None:
            (P, rank, K), shape = weights.a.shape, weights.b.shape
            fits = (self.num_parts, self.in_features) == (P, K) and shape == (rank, self.out_features)
            check(fits and weights.a.dtype == self.dtype, *weights)
        self._slots[slot] = weights
        self._ranks[slot] = 0 if weights is None else len(weights.b)
        self._addresses[:, slot] = torch.tensor(
            [0, 0] if weights is None else [x.data_ptr() for x in weights]
        )


def add_lora(x: Tensor, weights: NativeLoraWeights, tiles: Tensor, *, out: Tensor) -> None:
    """Add to each row of `out` what its adapter makes of the row of `x`; rows of no tile stay as they are.

    x: [T', K], out: [T', N] of the weights' dtype. tiles: [n, 3] int32 of lora_definition.lora_tiles, for
    these rows and slots; −1 is padding. Raises ValueError if they do not fit.
    """
    (T, K), N = x.shape, weights.out_features
    check(weights.in_features == K and out.shape == (T, N) and x.dtype == weights.dtype, x, out)
    if tiles.ndim != 2 or tiles.shape[1] != 3 or tiles.dtype != torch.int32 or not tiles.is_contiguous():
        raise ValueError(f"tiles must be a contiguous [n, 3] int32, got {describe(tiles)}")
    function("cabochon_add_lora", "pppppppiiiiii")(
        x.data_ptr(), out.data_ptr(), tiles.data_ptr(), *weights.tables, len(tiles), weights.num_parts, K, N,
        *how(x),
    )  # fmt: skip
