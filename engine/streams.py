"""Where a step's work goes: to a GPU's stream, or at once to the CPU.

Work touches nothing that the host changes afterwards: what it needs of the host travels in a packet.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Stream(ABC):
    """Runs work in the order in which it was given."""

    @abstractmethod
    def run(self, work: Callable[[], Value]) -> Callable[[], Value]:
        """Start the work. Returns what waits until all of it is done, and then gives its value."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> Tensor:
        """Inside of work: a copy on the host, there once the work is done."""

    @abstractmethod
    def host_buffer(self, num_words: int) -> Tensor:
        """[num_words] int32 on the host, from which a device can copy while the host goes on."""


class CpuStream(Stream):
    """Work is done when `run` returns."""

    def run(self, work: Callable[[], Value]) -> Callable[[], Value]:
        value = work()
        return lambda: value

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def host_buffer(self, num_words: int) -> Tensor:
        return torch.empty(num_words, dtype=torch.int32)


class CudaStream(Stream):
    """The current stream of the current device; copies from and to pinned memory."""

    def run(self, work: Callable[[], Value]) -> Callable[[], Value]:
        value = work()
        # blocking: the host sleeps instead of spinning in the driver, whose lock other threads need
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()

        def wait() -> Value:
            done.synchronize()
            return value

        return wait

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # from torch's cache
        return host.copy_(tensor, non_blocking=True)

    def host_buffer(self, num_words: int) -> Tensor:
        return torch.empty(num_words, dtype=torch.int32, pin_memory=True)


def stream_for(device: torch.device) -> Stream:
    """Of that device's kind."""
    return CudaStream() if device.type == "cuda" else CpuStream()
