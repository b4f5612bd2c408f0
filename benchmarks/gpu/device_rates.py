"""The two rates behind every share, on a GPU or, for a dry run, on a CPU; and what a step cannot beat."""

import statistics
import time
from collections.abc import Callable

import torch
from gpu_rates import Rates, measure_rates
from gpu_rates import environment as environment_of_kernels

REPS_MS = 100
SMALL_BYTES = 2**24
SMALL_PRODUCT = 256
CPU_RUNS = 5


def rates(device: str) -> Rates:
    """Measured now. On a CPU with small operands, which tells nothing about the CPU."""
    if device == "cuda":
        return measure_rates(REPS_MS)
    source = torch.ones(SMALL_BYTES // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    a = torch.ones(SMALL_PRODUCT, SMALL_PRODUCT, dtype=torch.bfloat16)
    return Rates(
        copy_gb_per_s=SMALL_BYTES / _median_s(lambda: target.copy_(source)) / 1e9,
        product_tflop_per_s=2 * SMALL_PRODUCT**3 / _median_s(lambda: a @ a) / 1e12,
    )


def _median_s(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(CPU_RUNS):
        started_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def floor_ms(read_bytes: float, flops: float, measured: Rates) -> float:
    """Milliseconds in which no program can read these bytes and do these operations."""
    return max(read_bytes / measured.copy_gb_per_s / 1e6, flops / measured.product_tflop_per_s / 1e9)


def environment(device: str) -> dict[str, object]:
    """All that a reader needs to repeat a row."""
    if device == "cuda":
        return environment_of_kernels()
    return {**environment_of_kernels(), "device": "cpu", "is_dry_run": True}
