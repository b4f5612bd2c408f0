"""The machine, and what it does at best: copy rate and bf16 product.

python benchmarks/gpu/bench_roofline.py
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

import torch
from cases import Row, arguments, run_cases
from device_rates import environment, rates

PACKAGES = ("torch", "triton", "transformers", "numpy", "msgspec", "llguidance", "flash-attn", "fa3-fwd",
            "flashinfer-python")  # fmt: skip


def machine(device: str) -> Iterator[Row]:
    row: Row = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "gpu": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    yield {**row, **environment(device)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(asked, capture_output=True, text=True, check=False)
    return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout.strip() else None


def roofline(device: str) -> Iterator[Row]:
    yield dict(rates(device)._asdict())


def main() -> int:
    args = arguments(__doc__).parse_args()
    return run_cases([("machine", lambda: machine(args.device)), ("roofline", lambda: roofline(args.device))])


if __name__ == "__main__":
    sys.exit(main())
