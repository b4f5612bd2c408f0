"""Many arrays in one buffer: writes to any of them arrive, in one scatter, and touch nothing else."""

import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.engine.arena import Allocate, Arena, RowFields
from cabochon.engine.errors import ConfigError

CPU = torch.device("cpu")
SHAPES = [
    ((3, 5), torch.int32),
    ((3,), torch.int64),
    ((3, 2), torch.float64),
    ((3, 4), torch.float32),
    ((2, 3, 7), torch.int32),
]


def arrays_of(allocate: Allocate) -> list[Tensor]:
    return [allocate(shape, dtype) for shape, dtype in SHAPES]


def test_writes_of_every_type_arrive_together_and_leave_the_rest_alone() -> None:
    arena, arrays = Arena.holding(arrays_of, CPU)
    rng = np.random.default_rng(0)
    expected = [torch.zeros(shape, dtype=dtype) for shape, dtype in SHAPES]
    for _ in range(20):
        for array, mirror in zip(arrays, expected, strict=True):
            row = int(rng.integers(len(array)))
            values = rng.integers(-(2**31), 2**31, array[row].numel()) / 3
            arena.write(array[row : row + 1], values)
            mirror[row] = torch.as_tensor(values).to(mirror.dtype).view_as(mirror[row])
        places, words = arena.take()
        assert len(np.unique(places)) == len(places)
        arena.apply(torch.from_numpy(places), torch.from_numpy(words))
        for array, mirror in zip(arrays, expected, strict=True):
            assert torch.equal(array, mirror)
    assert not len(arena.take()[0]), "what was taken is not staged again"


def test_single_elements_are_found_by_their_flat_places() -> None:
    arena, (*_, table) = Arena.holding(arrays_of, CPU)
    arena.write_elements(table, np.array([0, 41, 13]), np.array([7, 8, 9], np.int32))
    arena.apply(*map(torch.from_numpy, arena.take()))
    assert table.view(-1).nonzero().view(-1).tolist() == [0, 13, 41]
    assert table[1, 2, 6] == 8


def test_every_array_starts_where_triton_expects_pointers() -> None:
    _, arrays = Arena.holding(arrays_of, CPU)
    assert all((array.data_ptr() - arrays[0].data_ptr()) % 16 == 0 for array in arrays)


def test_an_arena_beyond_what_its_places_can_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_seqs rows must fit in 2\^31 words, got \d+: lower max_seqs"):
        Arena(2**31, torch.device("meta"))


def test_a_row_of_several_arrays_is_written_in_one_go() -> None:
    arena, arrays = Arena.holding(arrays_of, CPU)
    ints, longs, doubles, floats, _ = arrays
    fields = RowFields([ints, longs, doubles, floats])
    values = [1, -2, 3, -4, 2**31 - 1, 2**63 - 1, 0.1, -1e300, 0.5, 1.5, -2.5, 3.5]
    arena.write_row(fields, 2, values)
    arena.apply(*map(torch.from_numpy, arena.take()))
    assert ints.tolist() == [[0] * 5, [0] * 5, values[:5]]
    assert longs.tolist() == [0, 0, values[5]]
    assert doubles.tolist() == [[0, 0], [0, 0], values[6:8]]
    assert floats.tolist() == [[0] * 4, [0] * 4, values[8:]]
    with pytest.raises((struct.error, OverflowError)):
        fields.words([2**31, *values[1:]])
