"""What some tests need and a machine may lack: they skip with a reason, or fail with CABOCHON_TEST_ALL=1."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[1]
GATEWAY_TOOLS = ROOT / ".venv-gateway" / "bin"
DEPLOY_TOOLS = ROOT / ".venv-deploy" / "bin"
CAP = "ONEDNN_MAX_CPU_ISA"


def absent(reason: str) -> NoReturn:
    """Skips the test that calls it, or fails it where nothing may be left out."""
    if os.environ.get("CABOCHON_TEST_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def need_package(name: str) -> Any:
    """The module of that name, of the extra `clients`."""
    if find_spec(name) is None:
        absent(f"{name} is not installed: make clients")
    return import_module(name)


def ran_without_amx(request: pytest.FixtureRequest) -> bool:
    """Whether this was a CPU with AMX, and the test has run in a process that does not use it.

    oneDNN's bf16 products on AMX give a row other bits among 16 rows than among 64 (docs/decisions.md).
    """
    cpuinfo = Path("/proc/cpuinfo")
    if CAP in os.environ or not cpuinfo.exists() or "amx_bf16" not in cpuinfo.read_text():
        return False
    options = ["-q", "-m", "", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(ROOT / request.node.nodeid)],
        env={**os.environ, CAP: "AVX512_CORE_BF16"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return True


def need_program(name: str, *paths: str) -> str:
    """Where the program is: at the first of `paths` that is one, else on PATH."""
    for candidate in (*paths, name):
        if found := shutil.which(candidate):
            return found
    absent(f"{name} is not installed: run `make system-packages`")


def need_gateway_tools() -> Path:
    """The folder with Envoy and a Python that has its protocols."""
    if not (GATEWAY_TOOLS.parent / ".installed").exists():
        absent("Envoy is not installed: make gateway-tools")
    return GATEWAY_TOOLS


def need_deploy_tools() -> Path:
    """The folder with linters of shell scripts, Dockerfiles and manifests, uv, and a Python for it."""
    if not (DEPLOY_TOOLS.parent / ".installed").exists():
        absent("hadolint, shellcheck, checkov and uv are not installed: make deploy-tools")
    return DEPLOY_TOOLS
