"""LoRA's definition against merged weights, and the tiles against a row by row account."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from lora_case import MIXED, RANKS, LoraCase, make_case
from torch import Tensor

from cabochon.kernels.lora_definition import TILE_ROWS, LoraWeights, add_lora_reference, lora_tiles, max_tiles

Sequences = list[tuple[int, int]]


def with_merged_weights(case: LoraCase) -> Tensor:
    """Row by row, in fp64: x (W + B A)ᵀ with W = 0, on top of out."""
    x, out, (a, b, ranks, part_ends), sequences = case.wide()
    expected = out.clone()
    row, parts = 0, a.unflatten(1, (len(part_ends), -1))
    for slot, rows in sequences:
        for t in range(row, row + rows) if slot >= 0 else ():
            rank = int(ranks[slot])
            begin = 0
            for part, end in enumerate(part_ends):
                merged = b[slot, begin:end, :rank] @ parts[slot, part, :rank]  # [n, K]
                expected[t, begin:end] += merged @ x[t]
                begin = end
        row += rows
    return expected


@pytest.mark.parametrize("sizes", [(48,), (32, 32), (64, 16, 32)])
@pytest.mark.parametrize("tile_rows", [1, *TILE_ROWS])
def test_equals_merged_weights(sizes: tuple[int, ...], tile_rows: int) -> None:
    case = make_case(40, sizes)
    expected = with_merged_weights(case)
    wide = case.wide()
    add_lora_reference(wide.x, wide.weights, case.tiles(tile_rows), out=wide.out)
    torch.testing.assert_close(wide.out, expected, rtol=1e-12, atol=1e-12)
    add_lora_reference(case.x, case.weights, case.tiles(tile_rows), out=case.out)
    torch.testing.assert_close(case.out.double(), expected, rtol=1e-5, atol=1e-5)


def test_bf16_rounds_between_the_products_and_once_at_the_end() -> None:
    """257 is no bf16: 256. 1 + 2⁻¹⁰ is none either, but is not rounded before 256 is added: 258, not 256."""
    b = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0**-10]]).repeat_interleave(16, 0)
    a = torch.zeros(4, 3)
    a[0], a[1, 0], a[2, 0], a[3, 0] = torch.tensor([256.0, 1.0, 0.0]), 256.0, 1.0, 1.0
    weights = LoraWeights(a[None].bfloat16(), b[None].bfloat16(), torch.tensor([4], dtype=torch.int32), (32,))
    x, out = torch.ones(1, 3).bfloat16(), torch.tensor([[0.0, 256.0]]).repeat_interleave(16, 1).bfloat16()
    add_lora_reference(x, weights, torch.tensor([[0, 0, 1]]), out=out)
    assert out[0].tolist() == [0.0] * 16 + [258.0] * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    """With any number of rows: torch's own product of 640 columns differs between 4 rows and 16."""
    case = make_case(640, (64, 16), ((3, 50),), dtype=dtype)
    before = case.out.clone()
    add_lora_reference(case.x, case.weights, case.tiles(64), out=case.out)
    for first, end in ((0, 1), (7, 11), (16, 32), (49, 50), (3, 40)):
        out = before[first:end].clone()
        tiles = torch.tensor([[3, 0, end - first]])
        add_lora_reference(case.x[first:end].clone(), case.weights, tiles, out=out)
        assert torch.equal(out, case.out[first:end])


def test_rows_without_an_adapter_and_padding_stay_as_they_are() -> None:
    case = make_case(40, (32, 16))
    before = case.out.clone()
    tiles = torch.cat([torch.tensor([[-1, 0, 0], [-1, 2, 9]], dtype=torch.int32), case.tiles(16)])
    add_lora_reference(case.x, case.weights, tiles, out=case.out)
    slots = np.repeat([*(slot for slot, _ in MIXED), -1], [*(rows for _, rows in MIXED), 3])
    changes = torch.from_numpy((slots >= 0) & (np.array([*RANKS, 0])[slots] > 0))
    assert torch.equal((case.out != before).any(1), changes)
    assert torch.equal(case.out[~changes], before[~changes])


sequences_of_slots = st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 70)), max_size=20)


def tiles_of(sequences: Sequences, tile_rows: int) -> Tensor:
    slots, lens = np.array(sequences, dtype=np.int32).reshape(-1, 2).T
    tiles = lora_tiles(slots, lens, tile_rows)
    assert tiles.dtype == np.int32
    assert tiles.shape[1:] == (3,)
    return torch.from_numpy(tiles)


@given(sequences_of_slots, st.sampled_from([1, 3, 16, 64]))
def test_every_row_of_a_slot_is_in_one_tile_of_it_and_no_other_row_in_any(
    sequences: Sequences, tile_rows: int
) -> None:
    expected = [slot for slot, rows in sequences for _ in range(rows)]
    found = [-1] * len(expected)
    for slot, first, end in tiles_of(sequences, tile_rows).tolist():
        assert 0 < end - first <= tile_rows
        for t in range(first, end):
            assert found[t] == -1
            found[t] = slot
    assert found == expected


@given(sequences_of_slots, st.sampled_from([1, 3, 16, 64]))
def test_sorted_sequences_make_at_most_max_tiles(sequences: Sequences, tile_rows: int) -> None:
    tiles = tiles_of(sorted(sequences), tile_rows)
    assert len(tiles) <= max_tiles(sum(rows for _, rows in sequences), 4, tile_rows)


def test_neighbours_of_one_slot_share_tiles() -> None:
    sequences = [(2, 10), (2, 20), (-1, 0), (3, 0), (2, 4), (0, 1), (-1, 7), (0, 1), (5, 0)]
    assert tiles_of(sequences, 16).tolist() == [
        [2, 0, 16], [2, 16, 32], [2, 32, 34], [0, 34, 35], [0, 42, 43],
    ]  # fmt: skip


@pytest.mark.parametrize("sequences", [[], [(-1, 9), (-1, 2)], [(3, 0)]])
def test_without_rows_of_adapters_there_are_no_tiles(sequences: Sequences) -> None:
    assert tiles_of(sequences, 16).shape == (0, 3)


def test_max_tiles_is_reached() -> None:
    assert max_tiles(67, 3, 16) == 7
    assert len(tiles_of([(0, 1), (1, 1), (2, 65)], 16)) == 7
    assert max_tiles(2, 8, 16) == 2
    assert max_tiles(0, 8, 16) == 0
