"""When requests come: seeded sequences of seconds since the start, and what a trace says of each request.

An open loop sends at these times whether or not earlier answers have come. A closed loop has no times: a
client sends its next request when its last has ended (`serving.py`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Gaps = Iterator[float]


class Traced(NamedTuple):
    """A request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def poisson(rate: float, rng: np.random.Generator) -> Gaps:
    """Times at `rate` requests per second, each independent of all others. Without end."""
    return bursty(rate, 1.0, rng)


def bursty(rate: float, cv: float, rng: np.random.Generator) -> Gaps:
    """Gamma-distributed gaps of mean 1 / rate and coefficient of variation `cv`. Without end.

    cv = 1 is a Poisson process; above it requests come in bursts with long pauses, below it evenly.
    """
    shape = 1 / cv**2
    at_s = 0.0
    while True:
        at_s += float(rng.gamma(shape, 1 / (rate * shape)))
        yield at_s


def every(period_s: float) -> Gaps:
    """One at the start of each period, the first after half of one. Without end."""
    at_s = period_s / 2
    while True:
        yield at_s
        at_s += period_s


def until(times: Gaps, end_s: float) -> list[float]:
    """Those before end_s."""
    kept = []
    for at_s in times:
        if at_s >= end_s:
            break
        kept.append(at_s)
    return kept


def read_trace(path: Path, speed: float = 1.0) -> list[Traced]:
    """A JSON line for each request, in order of time: Mooncake's keys, or at_s, prompt_tokens, output_tokens.

    Mooncake's `timestamp` is in ms. speed: 2 replays in half the time. Raises ValueError, naming the line.
    """
    traced: list[Traced] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            one = _traced(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                "each line of a trace must have timestamp, input_length and output_length, or at_s,"
                f" prompt_tokens and output_tokens, line {number} has not: correct it"
            ) from None
        if traced and one.at_s / speed < traced[-1].at_s:
            raise ValueError(f"a trace must be in order of time, line {number} is earlier: sort it")
        traced.append(one._replace(at_s=one.at_s / speed))
    return traced


def _traced(row: Any) -> Traced:
    if "timestamp" in row:
        return Traced(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]))
    return Traced(float(row["at_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
