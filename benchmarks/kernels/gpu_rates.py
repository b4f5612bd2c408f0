"""What every kernel benchmark needs on a GPU: times, the machine's own rates, rows.

Rates are measured in the same run as the kernels: a share of them means the same on any card and clock.
"""

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

COPY_BYTES = 2**30
PRODUCT_SIZE = 8192


class Time(NamedTuple):
    """Milliseconds over many runs."""

    median_ms: float
    p20_ms: float
    p80_ms: float


class Rates(NamedTuple):
    """copy_gb_per_s counts bytes read and written. product_tflop_per_s: bf16, 8192³."""

    copy_gb_per_s: float
    product_tflop_per_s: float


def time_call(call: Callable[[], object], reps_ms: int) -> Time:
    """Time `call` on the device, after warm-up, L2 flushed between runs.

    It is captured in a CUDA graph first, so that the host's launches do not count.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return Time(*triton.testing.do_bench(graph.replay, rep=reps_ms, quantiles=[0.5, 0.2, 0.8]))


def measure_rates(reps_ms: int) -> Rates:
    """The copy rate and the bf16 product of this GPU, now."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), reps_ms)
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    product = time_call(lambda: torch.mm(a, a, out=out), reps_ms)
    return Rates(
        copy_gb_per_s=COPY_BYTES / copy.median_ms / 1e6,
        product_tflop_per_s=2 * PRODUCT_SIZE**3 / product.median_ms / 1e9,
    )


def environment() -> dict[str, object]:
    """All that a reader needs to repeat a row: written into every one."""
    git = ["git", "describe", "--always", "--dirty"]
    has_git = shutil.which(git[0]) is not None  # a GPU machine may have a copy of the files alone
    commit = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if has_git else ""
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"commit": commit, "device": device, "torch": torch.__version__, "triton": triton.__version__}


def emit(row: dict[str, object], out: Path | None) -> None:
    """Print a row, and append it to `out`. Floats keep four significant digits."""
    line = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")
