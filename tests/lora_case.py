"""Packed rows with adapters of several ranks: all that no rank covers, and all around the rows, is NaN."""

from typing import NamedTuple

import numpy as np
import torch
from guarded import SENTINEL, guarded, noise
from torch import Tensor

from cabochon.kernels.lora_definition import LoraWeights, lora_tiles

RANKS = (8, 0, 64, 16, 5)
MIXED = ((0, 3), (-1, 2), (2, 70), (2, 1), (1, 5), (3, 17), (-1, 1), (4, 16), (0, 1))  # slot, rows


def make_weights(
    K: int, part_sizes: tuple[int, ...], *, ranks: tuple[int, ...] = RANKS, R: int = 64,
    dtype: torch.dtype = torch.float32, stale: float = torch.nan,
) -> LoraWeights:  # fmt: skip
    """Adapters whose change is about as large as what it is added to. stale: what lies beyond the ranks."""
    S, P, N = len(ranks), len(part_sizes), sum(part_sizes)
    a = noise(S, P, R, K, seed=1, gain=K**-0.5)
    b = noise(S, N, R, seed=2)
    for slot, rank in enumerate(ranks):
        a[slot, :, rank:], b[slot, :, rank:] = stale, stale
        b[slot] /= max(rank, 1) ** 0.5
    ends = tuple(int(end) for end in np.cumsum(part_sizes))
    return LoraWeights(a.flatten(1, 2).to(dtype), b.to(dtype), torch.tensor(ranks, dtype=torch.int32), ends)


class LoraCase(NamedTuple):
    """x: [T', K], out: [T', N], both inside other memory. sequences: (slot, rows) in packed order."""

    x: Tensor
    out: Tensor
    weights: LoraWeights
    sequences: tuple[tuple[int, int], ...]

    def tiles(self, tile_rows: int) -> Tensor:
        """[n, 3] int32."""
        slots, lens = np.array(self.sequences, dtype=np.int32).reshape(-1, 2).T
        return torch.from_numpy(lora_tiles(slots, lens, tile_rows))

    def wide(self) -> "LoraCase":
        """The same values in fp64."""
        a, b, ranks, part_ends = self.weights
        weights = LoraWeights(a.double(), b.double(), ranks, part_ends)
        return LoraCase(self.x.double(), self.out.double(), weights, self.sequences)


def make_case(
    K: int, part_sizes: tuple[int, ...], sequences: tuple[tuple[int, int], ...] = MIXED, *,
    ranks: tuple[int, ...] = RANKS, R: int = 64, dtype: torch.dtype = torch.float32,
) -> LoraCase:  # fmt: skip
    """`pad` rows that belong to no sequence stand at the end, as in a step of T' rows."""
    num_rows = sum(rows for _, rows in sequences) + 3
    return LoraCase(
        guarded(noise(num_rows, K, seed=3).to(dtype)),
        guarded(noise(num_rows, sum(part_sizes), seed=4).to(dtype), around=SENTINEL),
        make_weights(K, part_sizes, ranks=ranks, R=R, dtype=dtype),
        sequences,
    )
