"""Traces of arrivals for tests of autoscaling, under tests/server/traces: `python tests/arrival_traces.py`.

A line is [second, requests, prompt tokens of each, output tokens of each], one for every five seconds.
Requests come by a Poisson process of the given rate, lengths vary by a tenth; a trace's name is its seed.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TRACES = Path(__file__).parent / "server" / "traces"
STEP_S = 5
OUTPUT_TOKENS = 100


class Arrivals(NamedTuple):
    """What comes in during STEP_S from `second` on."""

    second: int
    requests: int
    prompt_tokens: int
    output_tokens: int


class Shape(NamedTuple):
    """Requests per second and prompt tokens, each of the second."""

    minutes: int
    rate: Callable[[float], float]
    prompt: Callable[[float], float] = lambda _: 1000.0


SHAPES = {
    "ramp": Shape(18, lambda s: 8 + 24 * min(1.0, max(0.0, s - 180) / 720)),
    "burst": Shape(20, lambda s: 20.0 if 300 <= s < 600 else 3.0),
    "diurnal": Shape(90, lambda s: 3 + 15 * math.sin(math.pi * min(s, 3600) / 3600)),
    "noise": Shape(60, lambda _: 9.6),  # 2.4 replicas of replica_pool: 0.8 of three
    "long_prompts": Shape(30, lambda _: 4.0, lambda s: 500 + 4500 * min(1.0, s / 1200)),
    "steady": Shape(15, lambda _: 8.0),
}


def make(name: str) -> list[Arrivals]:
    """The same lines every time."""
    shape = SHAPES[name]
    draw = random.Random(name)
    lines = []
    for second in range(0, shape.minutes * 60, STEP_S):
        prompt = round(shape.prompt(second) * draw.uniform(0.9, 1.1))
        lines.append(Arrivals(second, _poisson(draw, shape.rate(second) * STEP_S), prompt, OUTPUT_TOKENS))
    return lines


def read(name: str) -> list[Arrivals]:
    """The stored lines."""
    return [Arrivals(*json.loads(line)) for line in (TRACES / f"{name}.jsonl").read_text().splitlines()]


def _poisson(draw: random.Random, mean: float) -> int:
    count, left = -1, mean
    while left > 0:
        left -= draw.expovariate(1.0)
        count += 1
    return max(0, count)


def main() -> None:
    """Write all traces."""
    for name in SHAPES:
        lines = [json.dumps(line, separators=(",", ":")) for line in make(name)]
        (TRACES / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
