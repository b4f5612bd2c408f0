#!/usr/bin/env python3
"""Pins what the images install: writes gpu.txt and cpu.txt, one line a package, with hashes of its wheels.

`make image-pins` takes the newest versions that pyproject.toml allows, `--keep` those that are pinned.
uv resolves: it reads the metadata of CUDA's gigabytes by HTTP ranges, where pip downloads the wheels.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PYTHON = (3, 12)
GLIBC_MINOR = 36  # Debian 12's; python:3.12-slim has this or a newer one, and llguidance asks for 2.31
TORCH = "torch==2.11.0"  # what its CUDA 13 and Triton 3.6 kernels are compiled and tested for
EXTRAS = ["ray", "armor", "otel", "kv-events"]
# torch's own: in the CPU image torch comes from PyTorch's index, without them, and with another hash
CUDA_ONLY = ("torch", "triton", "nvidia-", "cuda-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the versions that are pinned")
    parser.add_argument("--output", type=Path, default=HERE, help="folder that the two files go to")
    options = parser.parse_args()
    kept = [*pins(HERE / "gpu.txt"), *pins(HERE / "cpu.txt")] if options.keep else []
    gpu = resolve(EXTRAS, "x86_64", [TORCH, *kept])
    same = [*kept, *(f"{name}=={version}" for name, (version, _) in gpu.items())]
    cpu: dict[str, tuple[str, set[str]]] = {}
    for machine in ("x86_64", "aarch64"):
        for name, (version, found) in resolve([*EXTRAS, "demo"], machine, [TORCH, *same]).items():
            if not name.startswith(CUDA_ONLY):
                assert cpu.setdefault(name, (version, set()))[0] == version, name
                cpu[name][1].update(found)
    (options.output / "gpu.txt").write_text(render(gpu, "the GPU image, linux/amd64"))
    (options.output / "cpu.txt").write_text(render(cpu, "the CPU image, linux/amd64 and arm64; torch apart"))


def resolve(extras: list[str], machine: str, constraints: list[str]) -> dict[str, tuple[str, set[str]]]:
    """What the project needs on that machine: name to version and SHA-256 of each wheel that fits it."""
    with tempfile.TemporaryDirectory() as folder:
        constraint_file, lock = Path(folder) / "constraints.txt", Path(folder) / "pylock.toml"
        constraint_file.write_text("\n".join(constraints))
        command = ["uv", "pip", "compile", str(ROOT / "pyproject.toml"), "--format=pylock.toml", "--quiet"]
        command += [f"--extra={extra}" for extra in extras]
        command += [f"--constraint={constraint_file}", "--only-binary=:all:", "--no-python-downloads"]
        command += [
            f"--python-version={PYTHON[0]}.{PYTHON[1]}",
            f"--python-platform={machine}-manylinux_2_{GLIBC_MINOR}",
        ]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        subprocess.run([*command, f"--output-file={lock}"], check=True, env={**os.environ, "PATH": path})
        packages = tomllib.loads(lock.read_text())["packages"]
    fitting = set(tags(machine))
    return {
        canonicalize_name(entry["name"]): (entry["version"], hashes(entry, fitting)) for entry in packages
    }


def hashes(entry: dict[str, Any], fitting: set[Tag]) -> set[str]:
    """SHA-256 of the wheels of one package that fit. Raises ValueError if there is none."""
    found = {
        wheel["hashes"]["sha256"]
        for wheel in entry["wheels"]
        if parse_wheel_filename(wheel["url"].rpartition("/")[2])[3] & fitting
    }
    if not found:
        raise ValueError(
            f"every package needs a wheel for the image, {entry['name']} {entry['version']} has none:"
            " pin another"
        )
    return found


def tags(machine: str) -> Iterator[Tag]:
    """What CPython 3.12 of the base image installs."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC_MINOR, 4, -1)]
    platforms += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}"]
    yield from cpython_tags(PYTHON, platforms=platforms)
    yield from compatible_tags(PYTHON, interpreter=f"cp{PYTHON[0]}{PYTHON[1]}", platforms=platforms)


def pins(file: Path) -> list[str]:
    """`name==version` of each line."""
    return [line.split()[0] for line in file.read_text().splitlines() if not line.startswith("#")]


def render(packages: dict[str, tuple[str, set[str]]], purpose: str) -> str:
    """The text of a requirements file: pip takes it with --require-hashes --no-deps."""
    lines = [f"# For {purpose}: CPython 3.12. Written by `make image-pins`."]
    for name, (version, found) in sorted(packages.items()):
        lines.append(" ".join([f"{name}=={version}", *(f"--hash=sha256:{value}" for value in sorted(found))]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
