"""What the benchmarks of the small kernels share: a check before the time, a share of the copy rate.

A row is one (provider, shape). bytes: what must be read and written, so `share_of_copy` is that of a perfect
kernel. A fast wrong kernel gets no row. Times are of the device alone (gpu_rates.time_call).
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gpu_rates import emit, environment, measure_rates, time_call


class Case(NamedTuple):
    """`run` is timed, `check` raises if its last run was wrong."""

    provider: str
    shape: dict[str, object]
    run: Callable[[], object]
    check: Callable[[], None]
    moved_bytes: int


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what each of these benchmarks takes."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reps-ms", type=int, default=100, help="time spent on each row")
    p.add_argument("--out", type=Path, help="append the rows to this file")
    return p


def report(kernel: str, cases: Iterable[Case], args: argparse.Namespace) -> None:
    """Check, time and print each case."""
    env, copy = environment(), measure_rates(args.reps_ms).copy_gb_per_s
    for case in cases:
        case.run()
        case.check()
        time = time_call(case.run, args.reps_ms)
        gb_per_s = case.moved_bytes / time.median_ms / 1e6
        row = {
            "kernel": kernel, "provider": case.provider, **case.shape, **time._asdict(),
            "gb_per_s": gb_per_s, "copy_gb_per_s": copy, "share_of_copy": gb_per_s / copy, **env,
        }  # fmt: skip
        emit(row, args.out)
