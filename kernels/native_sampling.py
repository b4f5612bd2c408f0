"""kernels/native/sampling.c for torch: the largest logit of each row, and the few tokens that can win a draw.

None where there is no library, or not for such a tensor: the caller then does it in torch.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels import native

CAPACITY = 64  # of the C source


class Largest(NamedTuple):
    """highest: [R]. token_ids: [R] int64, the lowest id with it. num_tied: [R] int32, how many have it."""

    highest: Tensor
    token_ids: Tensor
    num_tied: Tensor


def greedy(logits: Tensor) -> Largest | None:
    """logits: [R, V]. What logits.max(-1) finds, for which NaN is the largest, and its ties (none of NaN)."""
    library = _library(logits)
    if library is None:
        return None
    num_rows = len(logits)
    highest = torch.empty(num_rows, dtype=torch.float32)
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    num_tied = torch.empty(num_rows, dtype=torch.int32)
    library.greedy(
        *_described(logits), num_rows, *map(_pointer, (highest, token_ids, num_tied)), torch.get_num_threads()
    )
    return Largest(highest.to(logits.dtype), token_ids, num_tied)


def candidates(
    logits: Tensor, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[int]
) -> list[Tensor | None] | None:
    """The tokens that can win each draw from logits[rows] / temperatures by the noise of keys (sampling.py).

    logits: [R, V] without NaN. keys: 64 bits each. Returns for each draw ascending ids [C] int64, or None
    where there are too many, or all logits are −inf.
    """
    library = _library(logits)
    if library is None:
        return None
    num_draws = len(rows)
    given = (
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(temperatures, dtype=torch.float32),
        torch.tensor(keys, dtype=torch.uint64),
    )
    token_ids = torch.empty((num_draws, CAPACITY), dtype=torch.int32)
    counts = torch.empty(num_draws, dtype=torch.int32)
    written = map(_pointer, (*given, token_ids, counts))
    library.candidates(*_described(logits), num_draws, *written, torch.get_num_threads())
    found = zip(token_ids.long(), counts.tolist(), strict=True)
    return [ids[:count] if count > 0 else None for ids, count in found]


def _library(logits: Tensor) -> ctypes.CDLL | None:
    """The library, if it can read these."""
    is_known = logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float32)
    if not is_known or logits.stride(1) != 1 or logits.shape[1] == 0:
        return None
    library: ctypes.CDLL | None = native.library()  # type: ignore[attr-defined]  # mypy sees the folder native/
    return library


def _described(logits: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64, int, int]:
    """Its address, row_bytes, vocab_size, is_bf16."""
    row_bytes = ctypes.c_int64(logits.stride(0) * logits.element_size())
    return _pointer(logits), row_bytes, logits.shape[1], int(logits.dtype == torch.bfloat16)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
