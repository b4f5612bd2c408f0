"""Messages over a stream socket between the server process and the engine process: length, kind, msgpack.

Both ends are the same program, so the order of KINDS is the protocol's version.
"""

import struct
from typing import Any, get_args

import msgspec

from cabochon.engine.messages import (
    Abort,
    AdapterReply,
    Failed,
    LoadAdapter,
    Loading,
    Log,
    Publish,
    Ready,
    Start,
    StepOutput,
    Submit,
    UnloadAdapter,
)

Message = (
    Start | Submit | Abort | Publish | LoadAdapter | UnloadAdapter  # to the engine
    | Loading | Ready | Failed | Log | AdapterReply | StepOutput
)  # fmt: skip
KINDS: tuple[type[Any], ...] = get_args(Message)

_HEADER = struct.Struct("<IB")  # bytes of the body, index into KINDS
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = [msgspec.msgpack.Decoder(kind) for kind in KINDS]


def encode(message: Message) -> bytes:
    """One frame."""
    body = _ENCODER.encode(message)
    return _HEADER.pack(len(body), KINDS.index(type(message))) + body


class FrameReader:
    """Cuts a byte stream into messages; keeps what is not whole yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Take bytes as they come. Returns the messages that are now whole, in order."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            size, kind = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + size
            if len(self._buffer) < end:
                break
            body = memoryview(self._buffer)[start + _HEADER.size : end]
            messages.append(_DECODERS[kind].decode(body))
            body.release()
            start = end
        del self._buffer[:start]
        return messages
