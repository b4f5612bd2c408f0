"""What stands beside every number: the machine, the versions, the command; and the file that keeps both."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, object]:
    """All that a reader needs to repeat a row: written into every one."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
    return {
        "commit": commit,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "command": command(sys.argv),
    }


def command(argv: list[str]) -> str:
    """As one would type it in the root of the repository."""
    program = Path(argv[0])
    if program.is_absolute() and program.is_relative_to(ROOT):
        program = program.relative_to(ROOT)
    return shlex.join(["python", str(program), *argv[1:]])


def version(package: str) -> str | None:
    """None if it is not installed; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def emit(row: dict[str, object], out: Path | None) -> None:
    """Print a row, and append it to `out`."""
    line = json.dumps(row)
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
