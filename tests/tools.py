"""What some tests need and a machine may lack: they skip with a reason, or fail with CABOCHON_TEST_ALL=1."""

import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

GATEWAY_TOOLS = Path(__file__).parents[1] / ".venv-gateway" / "bin"


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
