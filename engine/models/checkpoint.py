"""A directory of safetensors, read tensor by tensor: one file, or shards with an index.

Each tensor is handed out once, by name, with the shape the model expects; the caller packs and drops it, so
memory stays near what the loaded model needs. No pickle is ever read.
"""

import json
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cabochon.engine.errors import BadCheckpoint

CPU = torch.device("cpu")
IGNORED = {"lm_head.weight"}  # tied to the embedding; some exporters write it all the same


class Weights(Protocol):
    """What a model is loaded from: a checkpoint, or something that stands before one."""

    @property
    def num_elements(self) -> int:
        """Of all its tensors."""

    def load(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
    ) -> Tensor:
        """As `Checkpoint.load`."""

    def close(self) -> None:
        """As `Checkpoint.close`."""


class Checkpoint:
    """Open with the constructor, `close` when done. Raises BadCheckpoint if files are bad."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        for path in self._files():
            file = self._open(path)
            self._file_of |= dict.fromkeys(file.keys(), file)
        self._left = set(self._file_of) - IGNORED
        self.num_elements = sum(prod(self._shape(name)) for name in self._left)

    def load(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
    ) -> Tensor:
        """The tensor `name`, which must have that shape, as dtype on the device."""
        if name not in self._file_of:
            raise BadCheckpoint(
                f"the checkpoint must have a tensor {name}, {self._directory} has none: download it again"
            )
        found = self._shape(name)
        if found != shape:
            raise BadCheckpoint(
                f"tensor {name} must be {list(shape)} by config.json, got {list(found)}:"
                " configuration and weights are of different models"
            )
        self._left.discard(name)
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor.to(
            device, dtype, copy=True
        )  # a view of the mapped file would change, or fault, with the file

    def close(self) -> None:
        """Close the files. Raises BadCheckpoint if a tensor was never asked for: the model is another one."""
        self._file_of.clear()
        self._stack.close()
        if self._left:
            raise BadCheckpoint(
                f"every tensor must belong to the model, {len(self._left)} do not, such as {min(self._left)}:"
                " configuration and weights are of different models"
            )

    def _files(self) -> list[Path]:
        index = self._directory / "model.safetensors.index.json"
        if not index.is_file():
            return sorted(self._directory.glob("*.safetensors"))
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            return sorted(self._directory / name for name in names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadCheckpoint(
                f"{index.name} must map tensors to files, it does not: download it again"
            ) from error

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError as error:
            raise BadCheckpoint(
                f"the shard {path.name} must exist, it does not: download it again"
            ) from error
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(
                f"{path.name} must be a whole safetensors file ({error}): download it again"
            ) from error

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())
