"""A small HTTP/1.1 client that keeps the pieces in which a server wrote its answer, as a gateway gets them.

Client libraries join and cut those pieces; whether an event lies in one of them is what we must know.
"""

import asyncio
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httptools

from cabochon.engine.errors import ConfigError

READ_BYTES = 65_536
CONNECT_S = 5.0


class HttpFailure(Exception):
    """The server could not be reached, or what it sent is no whole HTTP answer."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens, and the key it asks for."""

    host: str
    port: int
    is_tls: bool = False
    key: str | None = None

    @property
    def url(self) -> str:
        """Without the key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}"


def parse_url(text: str, key: str | None = None) -> Target:
    """http://host[:port]. Raises ConfigError on anything else."""
    parts = urlsplit(text)
    wrong = ConfigError(f"a URL must be http://HOST:PORT without a path, got {text}: correct it")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise wrong
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise wrong from None
    return Target(parts.hostname, port, parts.scheme == "https", key)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. pieces: as the server wrote them if it wrote chunks."""

    status: int
    headers: dict[str, str]  # names in lower case
    pieces: list[bytes]

    @property
    def body(self) -> bytes:
        """All pieces."""
        return b"".join(self.pieces)

    def json(self) -> Any:
        """The body; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Exchange:
    """An answer while it arrives. The parser calls the methods on_*."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: deque[bytes] = deque()
        self._chunk: list[bytes] | None = None
        self._has_headers = False
        self.is_whole = False
        self.keeps_alive = False  # whether the connection may be used again
        self.headers: dict[str, str] = {}

    @property
    def status(self) -> int:
        """Known as soon as there are headers."""
        return int(self._parser.get_status_code())

    async def read_headers(self) -> None:
        """Return when they are there. Raises HttpFailure."""
        while not self._has_headers:
            await self._feed()

    async def next_piece(self) -> bytes | None:
        """The next chunk of the body, None after the last. Raises HttpFailure if it ends before its end."""
        while not self._pieces and not self.is_whole:
            await self._feed()
        return self._pieces.popleft() if self._pieces else None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Those that are left, as they come. Raises HttpFailure."""
        while (piece := await self.next_piece()) is not None:
            yield piece

    async def whole(self) -> Answer:
        """Read to the end. Raises HttpFailure."""
        pieces = [piece async for piece in self.pieces()]
        return Answer(self.status, self.headers, pieces)

    async def _feed(self) -> None:
        try:
            data = await self._reader.read(READ_BYTES)
            if data:
                self._parser.feed_data(data)
            elif self._ends_with_the_connection():
                self.is_whole = True
            else:
                raise HttpFailure("the server closed the connection before its answer was whole")
        except OSError as error:
            raise HttpFailure(f"the connection broke: {type(error).__name__}") from None
        except httptools.HttpParserError as error:
            raise HttpFailure(f"the answer is not HTTP/1.1: {type(error).__name__}") from None

    def _ends_with_the_connection(self) -> bool:
        framing = {"content-length", "transfer-encoding"}
        return self._has_headers and not framing & set(self.headers)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; also one after the body."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The body begins."""
        self._has_headers = True

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self._chunk = []

    def on_body(self, data: bytes) -> None:
        """A part of a chunk, or of a body without chunks."""
        (self._pieces if self._chunk is None else self._chunk).append(data)

    def on_chunk_complete(self) -> None:
        """A chunk ends; the last one is empty."""
        if self._chunk:
            self._pieces.append(b"".join(self._chunk))
        self._chunk = []

    def on_message_complete(self) -> None:
        """The body ends."""
        self.is_whole = True
        self.keeps_alive = bool(self._parser.should_keep_alive())  # its answer later is another


class Connection:
    """One connection, opened when it is needed and again when the server has closed it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._last: Exchange | None = None

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """At once, whatever is under way: what a client that goes away does."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = self._last = None

    async def start(self, method: str, path: str, body: Any = None, *, with_key: bool = True) -> Exchange:
        """Send a request and wait for the answer's headers. Raises HttpFailure."""
        if self._last is not None and not self._last.keeps_alive:
            self.close()
        is_used = self._last is not None
        try:
            self._last = await self._start(method, path, body, with_key)
        except HttpFailure:
            if not is_used:
                raise
            self.close()  # the server may close an idle connection at any time
            self._last = await self._start(method, path, body, with_key)
        return self._last

    async def ask(self, method: str, path: str, body: Any = None, *, with_key: bool = True) -> Answer:
        """Send a request and read the whole answer. Raises HttpFailure."""
        return await (await self.start(method, path, body, with_key=with_key)).whole()

    async def _start(self, method: str, path: str, body: Any, with_key: bool) -> Exchange:
        if self._streams is None:
            self._streams = await _connect(self._target)
        reader, writer = self._streams
        writer.write(_request(self._target, method, path, body, with_key))
        exchange = Exchange(reader)
        with suppress(OSError):  # reading says what happened
            await writer.drain()
        await exchange.read_headers()
        return exchange


@asynccontextmanager
async def exchange(target: Target, method: str, path: str, body: Any = None) -> AsyncIterator[Exchange]:
    """A request on a connection of its own, which is closed at the end, whole or not."""
    async with Connection(target) as connection:
        yield await connection.start(method, path, body)


async def ask(target: Target, method: str, path: str, body: Any = None, *, with_key: bool = True) -> Answer:
    """The whole answer to a request on a connection of its own. Raises HttpFailure."""
    async with Connection(target) as connection:
        return await connection.ask(method, path, body, with_key=with_key)


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context() if target.is_tls else None
    try:
        async with asyncio.timeout(CONNECT_S):
            return await asyncio.open_connection(target.host, target.port, ssl=context)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError; a name may be too long
        raise HttpFailure(f"no connection to {target.url}: {type(error).__name__}") from None


def _request(target: Target, method: str, path: str, body: Any, with_key: bool) -> bytes:
    """As the picker asks: no Accept header. Bodies in JSON; bytes are that already."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {target.url.partition('://')[2]}"]
    if target.key is not None and with_key:
        lines.append(f"Authorization: Bearer {target.key}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content
