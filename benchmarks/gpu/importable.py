"""Makes cabochon.engine, cabochon.kernels and cabochon.server importable where nothing is installed.

Links to the three folders in a temporary one, and what fetched wheels hold unpacked beside it. Imports
nothing that a bare Python lacks.
"""

import os
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("engine", "kernels", "server")
HERE = ("benchmarks/gpu", "benchmarks/kernels")


def link_packages(folder: Path, root: Path = ROOT) -> Path:
    """Make `cabochon` in the folder, a namespace of links. Returns what goes on sys.path."""
    package = folder / "packages" / "cabochon"
    package.mkdir(parents=True)
    for layer in LAYERS:
        (package / layer).symlink_to(root / layer, target_is_directory=True)
    return package.parent


def unpack_wheels(wheels: Path, folder: Path) -> Path:
    """What wheels of absent packages hold, side by side: zip files give no extension modules."""
    target = folder / "wheels"
    target.mkdir(parents=True)
    for wheel in sorted(wheels.glob("*.whl")):
        if not is_installed(wheel.name.split("-")[0]):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(target)
    return target


def is_installed(distribution: str) -> bool:
    """Whether this Python has it already."""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def environment(folder: Path, wheels: Path, given: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process that can import everything. Leaves links and files in the folder."""
    env = dict(os.environ if given is None else given)
    paths = [link_packages(folder), *(ROOT / name for name in HERE), unpack_wheels(wheels, folder)]
    kept = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []
    env["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *kept])
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    return env
