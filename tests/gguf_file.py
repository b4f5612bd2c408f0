"""A second reader of GGUF files, from the format's specification: the gguf package takes 12 s for the demo's.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian).
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


class GgufFile:
    """fields: the metadata by key. `tensor` gives the weights of one name as fp32."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        magic, version, num_tensors, num_fields = self._unpack("4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        self.fields = {self._string(): self._value(self._unpack("I")[0]) for _ in range(num_fields)}
        self._tensors = {self._string(): self._tensor_info() for _ in range(num_tensors)}
        self._start = -(-self._at // ALIGNMENT) * ALIGNMENT

    @property
    def tensor_names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """[rows, columns] or [size] fp32."""
        shape, kind, offset = self._tensors[name]
        per_tile, tile_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = prod(shape) // per_tile * tile_bytes
        raw = np.frombuffer(self._data, np.uint8, num_bytes, self._start + offset)
        if kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)[rows]
        return dequantize(raw.reshape(*shape[:-1], -1)[rows], kind)

    def _tensor_info(self) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        (num_dims,) = self._unpack("I")
        *sizes, kind, offset = self._unpack(f"{num_dims}QIQ")
        return tuple(reversed(sizes)), GGMLQuantizationType(kind), offset

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._unpack(SCALARS[kind])[0]
        of, count = self._unpack("IQ")
        if of in SCALARS:
            return list(self._unpack(f"{count}{SCALARS[of]}"))
        return [self._value(of) for _ in range(count)]

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values
