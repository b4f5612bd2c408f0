"""Triton's interpreter, repaired.

Up to 3.9 it multiplies the bit patterns of bf16 in tl.dot as integers, and cuts fp32 to bf16 instead of
rounding: kernels that are right on a GPU would fail, and their rounding would not be tested. In 3.6, which
GPU machines have, no scalar can be a loop's bound under numpy 2.4.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor
_patched: set[int] = set()


def _widened(data: Any) -> Any:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.bfloat16 and target == tl.float32:
        return _widened(np.asarray(data))
    if source == tl.float32 and target == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert_float(data, source, target, rounding)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right = (_widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
    product = np.matmul(left, right, dtype=d.data.dtype) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function. Its module's names are patched once, not at every call: twice as fast."""
    if id(self.fn.__globals__) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(id(self.fn.__globals__))
    return self.rewrite()(*args, **kwargs)


@contextmanager
def repaired() -> Iterator[None]:
    """The interpreter with all three mended; for a whole session, for it keeps what it has patched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", _convert)
        patch.setattr(interpreter, "_patch_lang_tensor", _patch_tensor)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        yield
