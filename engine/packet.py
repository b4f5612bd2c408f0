"""What one step needs of the host, in one host-to-device copy: arrays packed into a buffer that is reused."""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.streams import Stream

ALIGNMENT = 4  # words: 16 bytes, what Triton's pointers are specialized for
FIRST_WORDS = 1 << 18
INT32 = np.dtype(np.int32)
DTYPES: dict[np.dtype[Any], torch.dtype] = {
    INT32: torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.bool_): torch.bool,
}
HostViews: TypeAlias = dict[np.dtype[Any], NDArray[Any]]
DeviceViews: TypeAlias = dict[np.dtype[Any], Tensor]


class Packet:
    """`put` while the host prepares, `send` inside the step's work: then what `put` gave is filled."""

    def __init__(self, host: Tensor, arrays: HostViews, on_device: DeviceViews) -> None:
        """host: [num_words] int32; arrays: the same memory; both views by type."""
        self._host = host
        self._arrays = arrays
        self._on_device = on_device
        self._size = len(host)  # a tensor's takes microseconds
        self._used = 0

    def put(self, array: NDArray[np.generic]) -> Tensor:
        """Its place on the device. Shapes stay; what no longer fits is copied by itself."""
        num_words = -(-array.nbytes // 4)
        if self._used + num_words > self._size:
            return torch.from_numpy(array.copy()).to(self._on_device[INT32].device)
        first = self._used * 4 // array.itemsize
        end = first + array.size
        self._used += -(-num_words // ALIGNMENT) * ALIGNMENT
        self._arrays[array.dtype][first:end] = array.reshape(-1)
        place = self._on_device[array.dtype][first:end]
        return place if array.ndim == 1 else place.view(array.shape)

    def send(self) -> None:
        self._on_device[INT32][: self._used].copy_(self._host[: self._used], non_blocking=True)


class PacketRing:
    """As many host buffers as steps may be on the device; that of the step which has come back is free.

    One buffer on the device is enough: its next copy runs behind the step that reads it.
    """

    def __init__(
        self, stream: Stream, device: torch.device, depth: int, num_words: int = FIRST_WORDS
    ) -> None:
        # Views are made once: to make one costs more than to copy what a step needs
        hosts = [stream.host_buffer(num_words) for _ in range(depth)]
        self._hosts = [(host, {dtype: host.numpy().view(dtype) for dtype in DTYPES}) for host in hosts]
        words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._on_device = {dtype: words.view(torch_dtype) for dtype, torch_dtype in DTYPES.items()}
        self._next = 0

    def open(self) -> Packet:
        """An empty packet for the step that is launched next."""
        host, arrays = self._hosts[self._next]
        self._next = (self._next + 1) % len(self._hosts)
        return Packet(host, arrays, self._on_device)
