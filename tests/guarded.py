"""Tensors whose surroundings would show: rows inside NaN memory, outputs full of NaN, offsets past 2^31."""

import mmap

import torch

SENTINEL = 704.0  # exact in every dtype but fp8


def noise(*shape: int, seed: int = 0, gain: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * gain


def guarded(x: torch.Tensor, pad: int = 5, around: float = torch.nan) -> torch.Tensor:
    """The same [T, ...] values as a view of wider rows: what lies between and around them is NaN."""
    flat = x.flatten(1)
    memory = torch.full((len(x) + 2, flat.shape[1] + 2 * pad), around, dtype=x.dtype)
    memory[1:-1, pad:-pad] = flat
    strides = (memory.shape[1], *torch.empty(x.shape[1:], device="meta").stride())
    return memory.as_strided(x.shape, strides, memory.shape[1] + pad)  # a view would forget one row's stride


def poisoned(*shape: int, dtype: torch.dtype, pad: int = 5) -> torch.Tensor:
    """An output full of NaN, with strided rows: what a kernel does not write shows."""
    return guarded(torch.full(shape, torch.nan, dtype=dtype), pad, SENTINEL)


def surroundings_are_untouched(x: torch.Tensor, pad: int = 5) -> bool:
    """Nothing was written around a `poisoned` x."""
    memory = torch.as_strided(x, (len(x) + 2, x.stride(0)), (x.stride(0), 1), 0).clone()
    memory[1:-1, pad:-pad] = SENTINEL
    return bool((memory == SENTINEL).all())


def far_apart(rows: int, row_len: int, dtype: torch.dtype, stride: int = 2**30) -> torch.Tensor:
    """[rows, row_len] zeros, row offsets past 2^31 elements from the third on; memory is only reserved."""
    size = ((rows - 1) * stride + row_len) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, row_len), (stride, 1))
