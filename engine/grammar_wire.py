"""What passes between the engine and a grammar process: frames of fixed form, a reason behind some.

Both ends are the same program, so the enums are the protocol. A grammar and the masks travel in shared
memory, so that no message is ever too large to send at once.
"""

import json
import os
import struct
from enum import IntEnum
from typing import NamedTuple

from cabochon.engine.sampling_params import Grammar

_ORDER = struct.Struct("<BIi")  # what, slot, token id
_REPLY = struct.Struct("<BIH")  # what, slot, bytes of the reason behind it
MAX_REASON_BYTES = 1024


class Ask(IntEnum):
    """Of a process. A slot is one output: its place in the grammar and its mask."""

    BEGIN = 0  # at the grammar's start
    ADVANCE = 1  # by a token that the mask allowed
    DROP = 2  # it is over: once answered, nobody writes into its mask any more


class Told(IntEnum):
    """By a process. All but DROPPED and COMPILED carry a reason if they need one."""

    COMPILED = 0
    REFUSED = 1  # the grammar, for all slots
    MASKED = 2  # the next mask is there
    COMPLETE = 3  # nothing may follow
    FAILED = 4  # it cannot be followed any further
    DROPPED = 5


class Order(NamedTuple):
    """To a process."""

    ask: Ask
    slot: int
    token_id: int = 0


class Reply(NamedTuple):
    """From a process."""

    told: Told
    slot: int = 0
    reason: str = ""


def encode_order(order: Order) -> bytes:
    """One frame."""
    return _ORDER.pack(*order)


def encode_reply(reply: Reply) -> bytes:
    """One frame; a long reason is cut."""
    reason = reply.reason.encode()[:MAX_REASON_BYTES]
    return _REPLY.pack(reply.told, reply.slot, len(reason)) + reason


def take_orders(buffer: bytearray) -> list[Order]:
    """Cut the whole orders off the buffer's start."""
    size = len(buffer) // _ORDER.size * _ORDER.size
    orders = [Order(Ask(ask), slot, token_id) for ask, slot, token_id in _ORDER.iter_unpack(buffer[:size])]
    del buffer[:size]
    return orders


def take_replies(buffer: bytearray) -> list[Reply]:
    """Cut the whole replies off the buffer's start."""
    replies, start = [], 0
    while len(buffer) - start >= _REPLY.size:
        told, slot, size = _REPLY.unpack_from(buffer, start)
        end = start + _REPLY.size + size
        if len(buffer) < end:
            break
        replies.append(Reply(Told(told), slot, buffer[start + _REPLY.size : end].decode(errors="replace")))
        start = end
    del buffer[:start]
    return replies


def grammar_file(grammar: Grammar) -> int:
    """A descriptor of memory that holds the grammar."""
    fd = os.memfd_create("grammar")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps([grammar.kind, grammar.text]).encode())
    return fd


def read_grammar(fd: int) -> Grammar:
    """What grammar_file wrote. Closes it."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        kind, text = json.load(file)
    return Grammar(kind=kind, text=text)
