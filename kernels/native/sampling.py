"""sampling.c for torch: the largest logit of each row, and the few tokens that can win a draw.

None where there is no library, or not for such a tensor: the caller then does it in torch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.native.library import IS_FP32, function, library

CAPACITY = 64  # of the C source


class Largest(NamedTuple):
    """highest: [R]. token_ids: [R] int64, the lowest id with it. num_tied: [R] int32, how many have it, or
    are within the slack."""

    highest: Tensor
    token_ids: Tensor
    num_tied: Tensor


def find_largest(logits: Tensor, slack: Tensor | None = None, relative_slack: float = 0.0) -> Largest | None:
    """What logits.max(-1) finds, for which NaN is the largest, and its ties (none of NaN).

    logits: [R, V]. slack: [R] fp32; by that, and relative_slack · |highest|, what counts as tied may be less.
    """
    if not _can_read(logits):
        return None
    num_rows = len(logits)
    highest = torch.empty(num_rows, dtype=torch.float32)
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    num_tied = torch.empty(num_rows, dtype=torch.int32)
    function("cabochon_find_largest", "pliiipfpppi")(
        *_described(logits), num_rows, None if slack is None else slack.data_ptr(), relative_slack,
        highest.data_ptr(), token_ids.data_ptr(), num_tied.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return Largest(highest.to(logits.dtype), token_ids, num_tied)


def find_candidates(
    logits: Tensor, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[int]
) -> list[Tensor | None] | None:
    """The tokens that can win each draw from logits[rows] / temperatures by the noise of keys (sampling.py).

    logits: [R, V] without NaN. keys: 64 bits each. Returns for each draw ascending ids [C] int64, or None
    where there are too many, or all logits are −inf.
    """
    if not _can_read(logits):
        return None
    num_draws = len(rows)
    row_ids = torch.tensor(rows, dtype=torch.int64)
    divisors = torch.tensor(temperatures, dtype=torch.float32)
    noise_keys = torch.tensor(keys, dtype=torch.uint64)
    token_ids = torch.empty((num_draws, CAPACITY), dtype=torch.int32)
    counts = torch.empty(num_draws, dtype=torch.int32)
    function("cabochon_find_candidates", "pliiipppppi")(
        *_described(logits), num_draws, row_ids.data_ptr(), divisors.data_ptr(), noise_keys.data_ptr(),
        token_ids.data_ptr(), counts.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    found = zip(token_ids.long(), counts.tolist(), strict=True)
    return [ids[:count] if count > 0 else None for ids, count in found]


def _can_read(logits: Tensor) -> bool:
    is_known = logits.device.type == "cpu" and logits.dtype in IS_FP32
    return is_known and logits.stride(1) == 1 and logits.shape[1] > 0 and library() is not None


def _described(logits: Tensor) -> tuple[int, int, int, int]:
    """Its address, row_bytes, vocab_size, is_fp32."""
    row_bytes = logits.stride(0) * logits.element_size()
    return logits.data_ptr(), row_bytes, logits.shape[1], IS_FP32[logits.dtype]
