"""Device arrays that live in one buffer, so that one scatter changes any elements of any of them."""

from collections.abc import Callable, Sequence
from math import prod
from struct import Struct
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.errors import ConfigError

Owner = TypeVar("Owner")
Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # shape, dtype -> zeros
NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32, torch.float64: np.float64}
CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f", torch.float64: "d"}  # struct's
ALIGNMENT = 4  # words


class Arena:
    """[num_words] int32. `writes` are collected on the host, and applied on the device in one operation.

    Raises ConfigError if they are too many to be named by int32.
    """

    def __init__(self, num_words: int, device: torch.device) -> None:
        if num_words >= 2**31:
            raise ConfigError(
                f"max_seqs rows must fit in 2^31 words, got {num_words}: lower max_seqs or max_model_len"
            )
        self._memory = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._used = 0
        self._places: list[NDArray[np.int32]] = []
        self._words: list[NDArray[np.int32]] = []

    @classmethod
    def holding(cls, make: Callable[[Allocate], Owner], device: torch.device) -> tuple["Arena", Owner]:
        """An arena just large enough for what `make` allocates. Calls it twice; the first is thrown away."""
        total = 0

        def measure(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal total
            total += _num_words(shape, dtype)
            return torch.empty(shape, dtype=dtype, device="meta")

        make(measure)
        arena = cls(total, device)
        return arena, make(arena._allocate)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start, self._used = self._used, self._used + _num_words(shape, dtype)
        return self._memory[start : self._used].view(dtype)[: prod(shape)].view(shape)

    def write(self, target: Tensor, values: NDArray[np.generic]) -> None:
        """target: a contiguous view of an allocated array. No element may be written twice before `take`."""
        words = np.ascontiguousarray(values, NUMPY[target.dtype]).reshape(-1).view(np.int32)
        self.write_words(first_word(target), words)

    def write_words(self, start: int, words: NDArray[np.int32]) -> None:
        """The same by the first's place: a view that only says where costs more than the rest."""
        self._places.append(np.arange(start, start + len(words), dtype=np.int32))
        self._words.append(words)

    def write_row(self, fields: "RowFields", row: int, values: Sequence[float]) -> None:
        """One row of all these arrays. The same rule."""
        self._places.append(fields.places(row))
        self._words.append(fields.words(values))

    def write_elements(self, target: Tensor, flat: NDArray[np.int64], values: NDArray[np.int32]) -> None:
        """Some elements of an int32 array, by their places in it as if it were flat."""
        self._places.append((flat + first_word(target)).astype(np.int32).reshape(-1))
        self._words.append(values.reshape(-1))

    def take(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Places and words of all writes since the last call."""
        if not self._places:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        places, words = np.concatenate(self._places), np.concatenate(self._words)
        self._places, self._words = [], []
        return places, words

    def apply(self, places: Tensor, words: Tensor) -> None:
        """On the device: memory[places] = words, both [n] int32."""
        if len(places):
            self._memory.index_copy_(0, places.long(), words)


class RowFields:
    """Allocated arrays of few elements per row, [max_seqs, ...] each, of which a row is written in one go."""

    def __init__(self, arrays: Sequence[Tensor]) -> None:
        self._struct = Struct("=" + "".join(f"{array[0].numel()}{CODES[array.dtype]}" for array in arrays))
        widths = [array.stride(0) * array.itemsize // 4 for array in arrays]
        starts = [np.arange(n) + first_word(array) for n, array in zip(widths, arrays, strict=True)]
        self._first = np.concatenate(starts).astype(np.int32)
        self._stride = np.repeat(widths, widths).astype(np.int32)

    def places(self, row: int) -> NDArray[np.int32]:
        """Of the row's words."""
        return self._first + row * self._stride

    def words(self, values: Sequence[float]) -> NDArray[np.int32]:
        """values: those of all arrays. Raises struct.error or OverflowError if one does not fit."""
        return np.frombuffer(self._struct.pack(*values), np.int32)


def first_word(array: Tensor) -> int:
    """The place of an allocated array, or of a view of one, in its arena."""
    return int(array.storage_offset()) * array.itemsize // 4


def _num_words(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // (4 * ALIGNMENT)) * ALIGNMENT
