"""Work that is counted instead of timed: our Python lines and calls, torch operators, their rows and bytes.

The same on every machine, busy or idle. Lines and calls are those of the package's own files: what torch and
numpy do inside changes with their versions.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cabochon.engine.core

ROOT = Path(cabochon.engine.core.__file__).resolve().parents[1]
PACKAGE = tuple(f"{ROOT / layer}/" for layer in ("server", "engine", "kernels"))  # not .venv beside them
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")  # calls until Python 3.11 alone
PRODUCTS = ("linear", "mm", "matmul")


@dataclass(slots=True)
class PythonWork:
    """Of our files, while counted."""

    lines: int = 0
    calls: int = 0


@contextmanager
def python_work() -> Iterator[PythonWork]:
    """Counts in this thread."""
    work = PythonWork()
    is_ours: dict[str, bool] = {}

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        work.lines += event == "line"
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in is_ours:
            is_ours[name] = str(Path(name).resolve()).startswith(PACKAGE)
        if not is_ours[name]:
            return None
        work.calls += frame.f_code.co_name not in COMPREHENSIONS
        return line

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield work
    finally:
        sys.settrace(before)


class TorchWork(TorchDispatchMode):
    """Counts operators, bytes of the tensors that they make, and rows that go into products."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.made_bytes = 0
        self.products = 0
        self.product_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        if isinstance(out, torch.Tensor) and not _is_alias(func):
            self.made_bytes += out.nbytes
        if any(word in func._schema.name for word in PRODUCTS):
            self.products += 1
            self.product_rows += args[0].shape[0]
        return out


def _is_alias(func: Any) -> bool:
    """Whether what it returns is a view of an argument, or one that it wrote into."""
    return any(value.alias_info is not None for value in func._schema.returns)
