"""The C kernels of kernels/native/, if this machine has them built: plain C, called through ctypes.

One library for each level of vector instructions: a wheel that is built on one machine runs on another. Where
none fits, or none was built for want of a compiler, callers fall back to torch's definitions.
"""

import ctypes
import functools
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

LEVELS = {"AVX512": "_native_v4", "AVX2": "_native_v3"}  # torch's names; x86-64-v4 and x86-64-v3


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this CPU, or None."""
    if platform.machine() in ("x86_64", "AMD64"):
        name = LEVELS.get(torch.backends.cpu.get_cpu_capability())
    else:
        name = "_native"
    if name is None:
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(name + suffix)
        if path.exists():
            return ctypes.CDLL(str(path))
    return None
