"""LoRA adapters on top of a linear layer: their weights, the tiles of rows they apply to, the definition.

Math     out[t] += B[slot] · (A[slot] · x[t]) for the rows t of a tile; the adapter's scale is folded into B
Rounding A · x is rounded to x's dtype, as PEFT does; B's product and the sum are fp32 (fp64 when given it)
         inside and rounded once
Source   arXiv:2106.09685. Torch and numpy alone: the CPU's path, and the oracle of the kernels in lora.py
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

TILE_ROWS = (16, 64)  # of decodes and of prefills: what the kernels take
REFERENCE_ROWS = 16  # always as many: torch's products on x86 give a row other bits among fewer or more


class LoraWeights(NamedTuple):
    """The adapters of one linear layer, in slots.

    a: [S, P · R, K], for each of P parts (q, k and v of a fused layer) R rows, the first `rank` in use.
    b: [S, N, R], the scale folded in, the first `rank` columns in use. ranks: [S] int32, 0 for a slot that
    changes nothing here; what lies beyond a rank may be anything. part_ends: columns of `out` from the end
    of the part before to its own belong to a part; ascending, the last is N.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    part_ends: tuple[int, ...]


def lora_tiles(slots: NDArray[np.int32], lens: NDArray[np.int32], tile_rows: int) -> NDArray[np.int32]:
    """Cut the rows of packed sequences into tiles of one adapter.

    slots: [S], the adapter of each sequence, −1 for none. lens: [S], its rows, maybe none.
    Returns [n, 3]: slot, first row, end row; neighbours of one slot share tiles, rows without one have none.
    """
    ends = np.cumsum(lens)
    is_kept = (slots >= 0) & (lens > 0)
    slots, starts, ends = slots[is_kept], (ends - lens)[is_kept], ends[is_kept]
    is_begin = np.ones(len(slots), dtype=bool)
    is_begin[1:] = (slots[1:] != slots[:-1]) | (starts[1:] != ends[:-1])
    is_end = np.append(is_begin[1:], True)[: len(slots)]
    slots, starts, ends = slots[is_begin], starts[is_begin], ends[is_end]  # of runs
    counts = -(-(ends - starts) // tile_rows)
    before = np.cumsum(counts) - counts
    of_run = np.repeat(np.arange(len(counts)), counts)
    firsts = starts[of_run] + (np.arange(len(of_run)) - before[of_run]) * tile_rows
    tiles = np.empty((len(of_run), 3), dtype=np.int32)
    tiles[:, 0], tiles[:, 1] = slots[of_run], firsts
    tiles[:, 2] = np.minimum(firsts + tile_rows, ends[of_run])
    return tiles


def max_tiles(num_rows: int, num_slots: int, tile_rows: int) -> int:
    """Tiles that num_rows rows make at most, if each of num_slots slots has its rows in one run."""
    return num_rows // tile_rows + min(num_slots, num_rows)


def add_lora_reference(x: Tensor, weights: LoraWeights, tiles: Tensor, *, out: Tensor) -> None:
    """The definition, in x's precision: .double() for the truth, bf16 for the error budget.

    x: [T', K]. out: [T', N] of x's dtype, changed in place; rows of no tile stay as they are.
    tiles: [n, 3] integers on the host, as of `lora_tiles`; slot −1 is padding. Their size does not matter.
    """
    a = weights.a.view(len(weights.a), len(weights.part_ends), -1, x.shape[1])  # [S, P, R, K]
    wide = torch.promote_types(x.dtype, torch.float32)
    ranks = weights.ranks.tolist()
    for slot, first, end in tiles.tolist():
        rank = ranks[slot] if slot >= 0 else 0
        if rank == 0:
            continue
        a_used = a[slot, :, :rank].flatten(0, 1).to(wide)  # [P · rank, K]
        b_used = weights.b[slot, :, :rank].to(wide)  # [N, rank]
        for start in range(first, end, REFERENCE_ROWS):
            rows = slice(start, min(start + REFERENCE_ROWS, end))
            low = _fixed_rows_linear(x[rows].to(wide), a_used).to(x.dtype)  # [rows, P · rank]
            begin = 0
            for part, part_end in zip(torch.split(low, rank, dim=1), weights.part_ends, strict=True):
                added = _fixed_rows_linear(part.to(wide), b_used[begin:part_end])
                out[rows, begin:part_end] = (out[rows, begin:part_end].to(wide) + added).to(x.dtype)
                begin = part_end


def _fixed_rows_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows: [at most REFERENCE_ROWS, k]. weight: [n, k]. Returns [rows, n]."""
    padding = REFERENCE_ROWS - len(rows)
    return F.linear(F.pad(rows, (0, 0, 0, padding)), weight)[: len(rows)]
