"""What a grammar says to a row that is about to sample: its mask, or why there is none."""

import time
from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.grammars import Matcher, State

MASK_GRACE_S = 0.005  # masks had the whole forward pass; a row whose mask is later still misses the step

Missing = Literal["late", "stuck"]  # not there yet; there is no next token


def next_mask(
    matcher: Matcher, grace_end_s: float, forbidden: Collection[int]
) -> NDArray[np.bool_] | Missing:
    """The tokens it allows but for the forbidden ones: [V]. Waits for the mask until grace_end_s."""
    if not matcher.wait(grace_end_s) or matcher.state is State.COMPLETE:
        return "late"  # one that is complete ends before the next step
    if matcher.state is State.FAILED:
        return "stuck"
    allowed = matcher.mask()
    allowed[list(forbidden)] = False
    return allowed if allowed.any() else "stuck"


def grace_end_s() -> float:
    """For all rows of a step together."""
    return time.monotonic() + MASK_GRACE_S
