"""Sampling on a CPU: the C kernels beside torch's definitions, turn by turn. Medians and their ratio.

python benchmarks/kernels/bench_native_sampling.py --rows 16 --vocab 262144
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from cabochon.kernels.native.sampling import find_largest
from cabochon.kernels.sampling import Draw, draw, gumbel_argmax_reference


def compare(name: str, before: Callable[[], object], after: Callable[[], object], repeats: int) -> None:
    """Prints a line."""
    times: dict[Callable[[], object], list[float]] = {before: [], after: []}
    for _ in range(repeats):
        for run, mine in times.items():
            start = time.perf_counter()
            run()
            mine.append(time.perf_counter() - start)
    torch_ms, c_ms = (statistics.median(times[run]) * 1e3 for run in (before, after))
    print(f"{name}: torch {torch_ms:.2f} ms, C {c_ms:.2f} ms, ratio {torch_ms / c_ms:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    logits = (torch.randn(args.rows, args.vocab) * 4).bfloat16()
    draws = [Draw(row, 0.9, row, 5) for row in range(args.rows)]

    def drawn() -> list[int]:
        return [
            gumbel_argmax_reference(logits[d.row].float() / d.temperature, d.seed, d.position) for d in draws
        ]

    def largest() -> object:
        highest, _ = logits.max(-1)
        return (logits == highest[:, None]).nonzero(as_tuple=True)

    assert draw(logits, draws) == drawn()
    compare("drawn", drawn, lambda: draw(logits, draws), args.repeats)
    compare("greedy", largest, lambda: find_largest(logits), args.repeats)


if __name__ == "__main__":
    main()
