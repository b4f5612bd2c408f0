"""Tile sizes per GPU: reads the committed table `_tune.json`. Nothing is measured here, nor at the start.

A row holds for one kernel, GPU and set of keys (head_dim, bits of a K or V element). `is_measured` false
marks an estimate: it compiles within the GPU's limits, but no benchmark has chosen it.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).parent / "_tune.json"
SMALLEST_HEAD_DIM = 64


class Gpu(NamedTuple):
    """name: what the device's name begins with. sm: 90 for 9.0. shared_bytes: at most per program."""

    name: str
    sm: int
    shared_bytes: int


class Row(NamedTuple):
    """One entry: `keys` select it, `config` are the kernel's constants."""

    kernel: str
    gpu: str
    keys: dict[str, int]
    config: dict[str, Any]
    is_measured: bool


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def gpus() -> list[Gpu]:
    """The GPUs of the table, most shared memory first."""
    found = [Gpu(name, row["sm"], row["shared_kib"] * 1024) for name, row in _table()["gpus"].items()]
    return sorted(found, key=lambda gpu: -gpu.shared_bytes)


def rows(kernel: str) -> list[Row]:
    """All entries of a kernel."""
    return [Row(kernel, **row) for row in _table()["rows"][kernel]]


def sm_of(gpu: str) -> int:
    """The architecture of a GPU of the table: 90 for 9.0."""
    return next(found.sm for found in gpus() if found.name == gpu)


def match_gpu(name: str, shared_bytes: int) -> Gpu:
    """The GPU of the table that `name` begins with, else the largest whose programs fit `shared_bytes`.

    Raises ValueError if none fits.
    """
    for gpu in gpus():
        if name.startswith(gpu.name):
            return gpu
    for gpu in gpus():
        if gpu.shared_bytes <= shared_bytes:
            return gpu
    raise ValueError(
        f"no tile sizes for {name} with {shared_bytes} bytes of shared memory: add it to {TABLE.name}"
    )


@functools.cache
def tuned(kernel: str, device: torch.device, **keys: int) -> dict[str, Any]:
    """The kernel's constants for a device. A head_dim below 64 takes the row of 64.

    On CPU, where kernels only run in Triton's interpreter, the first GPU's. Raises ValueError if there is no
    row.
    """
    keys["head_dim"] = max(keys["head_dim"], SMALLEST_HEAD_DIM)
    gpu = gpus()[0]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stub
        gpu = match_gpu(properties.name, shared_bytes)
    for row in rows(kernel):
        if row.gpu == gpu.name and row.keys == keys:
            return row.config
    raise ValueError(f"{TABLE.name} has no row of {kernel} for {gpu.name} and {keys}")
