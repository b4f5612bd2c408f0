"""sampling.c for torch: the largest logit of each row, and the few tokens that can win a draw.

None where there is no library, or not for such a tensor: the caller then does it in torch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.native.library import IS_FP32, check_floats, function, library

CAPACITY = 64  # of the C source


class Slack(NamedTuple):
    """How far a rounded logit of a row may be from the exact one."""

    absolute: Tensor  # [R] fp32
    relative: float  # to the logit

    def below(self, highest: Tensor) -> Tensor:
        """The least that the rounded logit of the likeliest token may be. highest: [R]. Returns [R] fp32."""
        return highest.float() - 2 * (self.absolute + self.relative * highest.float().abs())


class Largest(NamedTuple):
    """highest: [R]. token_ids: [R] int64, the lowest id with it. num_tied: [R] int32, how many have it, or
    might with the slack."""

    highest: Tensor
    token_ids: Tensor
    num_tied: Tensor


def find_largest(logits: Tensor, slack: Slack | None = None) -> Largest | None:
    """What logits.max(-1) finds, for which NaN is the largest, and its ties (none of NaN). logits: [R, V].

    With slack, what is not less than slack.below(highest) counts as tied.
    """
    if not _can_read(logits):
        return None
    num_rows = len(logits)
    highest = torch.empty(num_rows, dtype=torch.float32)
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    num_tied = torch.empty(num_rows, dtype=torch.int32)
    function("cabochon_find_largest", "pliiipfpppi")(
        *_described(logits), num_rows, *_slack_of(slack, num_rows), highest.data_ptr(), token_ids.data_ptr(),
        num_tied.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return Largest(highest.to(logits.dtype), token_ids, num_tied)


def find_candidates(
    logits: Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    keys: Sequence[int],
    cap: float | None = None,
    slack: Slack | None = None,
) -> list[Tensor | None] | None:
    """The tokens that can win each draw from logits[rows] / temperatures by the noise of keys (sampling.py).

    logits: [R, V] without NaN, softcapped first where there is a cap. keys: 64 bits each. slack: of all rows;
    then all that can win if the exact logits are drawn from. Returns for each draw ascending ids [C] int64,
    or None where there are too many, or all logits are −inf.
    """
    if not _can_read(logits):
        return None
    num_draws = len(rows)
    row_ids = torch.tensor(rows, dtype=torch.int64)
    divisors = torch.tensor(temperatures, dtype=torch.float32)
    noise_keys = torch.tensor(keys, dtype=torch.uint64)
    token_ids = torch.empty((num_draws, CAPACITY), dtype=torch.int32)
    counts = torch.empty(num_draws, dtype=torch.int32)
    function("cabochon_find_candidates", "pliiippppffppi")(
        *_described(logits), num_draws, row_ids.data_ptr(), divisors.data_ptr(), noise_keys.data_ptr(),
        *_slack_of(slack, len(logits)), cap or 0.0, token_ids.data_ptr(), counts.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    found = zip(token_ids.long(), counts.tolist(), strict=True)
    return [ids[:count] if count > 0 else None for ids, count in found]


def _can_read(logits: Tensor) -> bool:
    is_known = logits.device.type == "cpu" and logits.dtype in IS_FP32
    return is_known and logits.stride(1) == 1 and logits.shape[1] > 0 and library() is not None


def _slack_of(slack: Slack | None, num_rows: int) -> tuple[int | None, float]:
    """Its address and its relative part."""
    if slack is None:
        return None, 0.0
    check_floats(slack.absolute, num_rows)
    return slack.absolute.data_ptr(), slack.relative


def _described(logits: Tensor) -> tuple[int, int, int, int]:
    """Its address, row_bytes, vocab_size, is_fp32."""
    row_bytes = logits.stride(0) * logits.element_size()
    return logits.data_ptr(), row_bytes, logits.shape[1], IS_FP32[logits.dtype]
