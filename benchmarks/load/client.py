"""One streamed request, with the time of everything: over the raw HTTP reader of `gateway-check`.

No client library stands between the socket and the clock. A piece that the server wrote may hold several
events, which then have one time. The clock is time.perf_counter.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cabochon.server.gateway.http_client import Connection, Exchange, HttpFailure, Target

DONE = b"[DONE]"


@dataclass(slots=True)
class Record:
    """What happened to one request. Times in seconds of one clock; error: its kind, None if it went well."""

    kind: str
    scheduled_s: float  # when an open loop had to send it
    sent_s: float = 0.0
    end_s: float = 0.0
    event_s: list[float] = field(default_factory=list)  # of each event that carried text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class Client:
    """Connections to one server, kept open between requests: as many as were ever in use at once."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []

    def close(self) -> None:
        """All idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def stream(self, path: str, content: bytes, record: Record) -> None:
        """Send a body and read its events into `record`. Whatever goes wrong becomes `record.error`."""
        record.sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s), self._connection() as connection:
                await _read(await connection.start("POST", path, content), record)
        except TimeoutError:
            record.error = "timeout"
        except HttpFailure as failure:
            record.error = "no connection" if "no connection" in str(failure) else "broken answer"
        record.end_s = time.perf_counter()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        connection = self._idle.pop() if self._idle else Connection(self._target)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)


async def _read(exchange: Exchange, record: Record) -> None:
    """Raises HttpFailure."""
    if exchange.status != 200:
        await exchange.whole()
        record.error = f"http {exchange.status}"
        return
    rest = b""
    is_finished = False
    async for piece in exchange.pieces():
        now_s = time.perf_counter()
        *events, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            is_finished |= _take(event, now_s, record)
    if record.error is None and not (is_finished and record.event_s):
        record.error = "no text" if is_finished else "no end"


def _take(lines: bytes, now_s: float, record: Record) -> bool:
    """Enter one event. Returns whether it says that the answer is complete."""
    data = b"".join(line[5:].strip() for line in lines.split(b"\n") if line.startswith(b"data:"))
    if not data or data == DONE:
        return False
    try:
        event = _decode(data)
    except msgspec.MsgspecError:
        record.error = "broken event"
        return False
    if event.error is not None:
        record.error = "error event"
    if event.usage is not None:
        details = event.usage.prompt_tokens_details
        record.prompt_tokens = event.usage.prompt_tokens
        record.output_tokens = event.usage.completion_tokens
        record.cached_tokens = (details.cached_tokens or 0) if details else 0
    for choice in event.choices:
        if choice.text or (choice.delta and choice.delta.content):
            record.event_s.append(now_s)
    return any(choice.finish_reason for choice in event.choices)
