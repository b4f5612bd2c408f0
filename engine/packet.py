"""What one step needs of the host, in one host-to-device copy: arrays packed into a buffer that is reused."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.streams import Stream

ALIGNMENT = 4  # words: 16 bytes, what Triton's pointers are specialized for
FIRST_WORDS = 1 << 18
DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.bool_): torch.bool,
}


class Packet:
    """`put` while the host prepares, `send` inside the step's work: then what `put` gave is filled."""

    def __init__(self, host: Tensor, on_device: Tensor) -> None:
        self._host = host
        self._words = host.numpy()
        self._on_device = on_device
        self._used = 0

    def put(self, array: NDArray[np.generic]) -> Tensor:
        """Its place on the device. Shapes stay; what no longer fits is copied by itself."""
        data = np.ascontiguousarray(array)
        dtype = DTYPES[data.dtype]
        num_words = -(-data.nbytes // 4)
        if self._used + num_words > len(self._words):
            return torch.from_numpy(data.copy()).to(self._on_device.device)
        start, self._used = self._used, self._used + -(-num_words // ALIGNMENT) * ALIGNMENT
        self._words[start : start + num_words].view(np.uint8)[: data.nbytes] = data.reshape(-1).view(np.uint8)
        place = self._on_device[start : start + num_words]
        return place.view(dtype)[: data.size].view(data.shape)

    def send(self) -> None:
        self._on_device[: self._used].copy_(self._host[: self._used], non_blocking=True)


class PacketRing:
    """As many host buffers as steps may be on the device; that of the step which has come back is free.

    One buffer on the device is enough: its next copy runs behind the step that reads it.
    """

    def __init__(
        self, stream: Stream, device: torch.device, depth: int, num_words: int = FIRST_WORDS
    ) -> None:
        self._hosts = [stream.host_buffer(num_words) for _ in range(depth)]
        self._on_device = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._next = 0

    def open(self) -> Packet:
        """An empty packet for the step that is launched next."""
        host = self._hosts[self._next]
        self._next = (self._next + 1) % len(self._hosts)
        return Packet(host, self._on_device)
