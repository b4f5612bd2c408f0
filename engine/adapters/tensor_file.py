"""A safetensors file of which nothing is believed: header checked against the file's size, tensors by reads.

The library maps the file, and a mapped file that shrinks under its reader (a bucket's volume, an upload that
goes on) ends the process with SIGBUS. Adapters are read while others are served: here it is an error.
Format: https://huggingface.co/docs/safetensors, 8 bytes of length, a header in JSON, the tensors' bytes.
"""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cabochon.engine.errors import BadAdapter

MAX_HEADER_BYTES = 4 << 20  # 27B with all its modules has 0.1 MB; parsing 4 MiB takes a twentieth of a second
MAX_DIMENSIONS = 8
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorInfo(NamedTuple):
    """What the header says of a tensor. dtype as it is spelled there; offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class TensorFile:
    """Open with `with`. Raises BadAdapter if the header is not whole, or not true of this file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise self._bad(error.strerror or "unreadable") from error
        try:
            self.infos = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor of its own, of the dtype that it has in the file, which must be one of DTYPES."""
        info = self.infos[name]
        raw = torch.empty(info.num_bytes, dtype=torch.uint8)
        try:
            self._file.seek(info.offset)
            num_read = self._file.readinto(raw.numpy().data)
        except OSError as error:
            raise self._bad(error.strerror or "unreadable") from error
        if num_read != info.num_bytes:
            raise self._bad("it shrank while it was read")
        return raw.view(DTYPES[info.dtype]).view(info.shape)

    def _read_header(self) -> dict[str, TensorInfo]:
        try:
            size = self._file.seek(0, 2)
            self._file.seek(0)
            header_bytes = int.from_bytes(self._file.read(8), "little")
            start = 8 + header_bytes
            if size < 8 or start > size:
                raise self._bad(f"{size} bytes, truncated in its header")
            if header_bytes > MAX_HEADER_BYTES:
                raise self._bad(f"a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
            header = json.loads(self._file.read(header_bytes))
        except OSError as error:
            raise self._bad(error.strerror or "unreadable") from error
        except (ValueError, RecursionError) as error:
            raise self._bad("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._bad("its header is no object")
        header.pop("__metadata__", None)
        infos = {name: self._info(entry, start) for name, entry in header.items()}
        end = max((info.offset + info.num_bytes for info in infos.values()), default=start)
        if end != size:
            raise self._bad(f"{size} bytes where its header says {end}")
        return infos

    def _info(self, entry: Any, start: int) -> TensorInfo:
        """Raises BadAdapter unless the bytes are as many as the shape needs."""
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(low), int(high)]}:
                sizes = [size for size in shape if type(size) is int and size >= 0]
                if len(sizes) == len(shape) <= MAX_DIMENSIONS and 0 <= low <= high:
                    needed = math.prod(sizes) * DTYPES[dtype].itemsize if dtype in DTYPES else high - low
                    if needed == high - low:
                        return TensorInfo(dtype, tuple(sizes), start + low, needed)
        raise self._bad("its header has a tensor whose bytes do not fit its shape")

    def _bad(self, found: str) -> BadAdapter:
        return BadAdapter(
            f"{self._path.name} must be a whole safetensors file, it is not ({found}): save or copy it again",
            "lora_path",
        )
