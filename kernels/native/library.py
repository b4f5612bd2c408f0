"""The C kernels of this folder, if this machine has them built: plain C, called through ctypes.

One library for each level of vector instructions: a wheel that is built on one machine runs on another. Where
none fits, or none was built for want of a compiler, callers fall back to torch's operators.
"""

import ctypes
import functools
import platform
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# By torch's names: x86-64-v4 and x86-64-v3, the best first
LEVELS = {"AVX512": ("_v4", "_v3"), "AVX2": ("_v3",)}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The best for this CPU that was built, or None."""
    names: tuple[str, ...] = ("_any",)
    if platform.machine() in ("x86_64", "AMD64"):
        names = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ())
        if "_v4" in names and torch.cpu._is_vnni_supported():
            names = ("_v4_vnni", *names)
    for name in names:
        for suffix in EXTENSION_SUFFIXES:
            path = Path(__file__).with_name(name + suffix)
            if path.exists():
                return ctypes.CDLL(str(path))
    return None


TYPES: "dict[str, type[ctypes._SimpleCData[Any]]]" = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
}
IS_FP32 = {torch.bfloat16: 0, torch.float32: 1}  # the working dtypes that the kernels know


@functools.cache
def function(name: str, parameters: str) -> Callable[..., int]:
    """A function of the library, which must be there.

    parameters: a letter for each: pointer (an address), int, long (64 bits), float. What returns nothing in C
    returns noise here.
    """
    found = library()
    assert found is not None, "no native library: callers ask first"
    called = found[name]
    called.argtypes = [TYPES[letter] for letter in parameters]
    return called


def check(fits: bool, *tensors: Tensor) -> None:
    """Raises ValueError unless `fits`, and all are contiguous, on the CPU and of one known dtype."""
    first = tensors[0]
    if not fits or first.dtype not in IS_FP32 or first.device.type != "cpu":
        raise ValueError(f"shapes and dtypes must fit the kernel, got {[describe(x) for x in tensors]}")
    for x in tensors:
        if x.dtype != first.dtype or not x.is_contiguous():
            raise ValueError(
                f"tensors must be contiguous and of one dtype, got {[describe(x) for x in tensors]}"
            )


def check_floats(x: Tensor, size: int) -> None:
    """Raises ValueError unless it is a contiguous vector of `size` fp32: a norm's weight, scales."""
    if x.shape != (size,) or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"weights and scales must be a contiguous [{size}] fp32, got {describe(x)}")


def how(x: Tensor) -> tuple[int, int]:
    """The last two arguments of most functions: is_fp32, num_threads."""
    return IS_FP32[x.dtype], torch.get_num_threads()


def describe(x: Tensor) -> str:
    """For errors: shape, strides, dtype and device, no values."""
    return f"{list(x.shape)} {x.stride()} {x.dtype} {x.device}"
