"""The port that clients of the emulator see: it passes bytes to the gRPC server behind, or does what no gRPC
server does by itself: refuses connections and listens again on the same port, resets one in mid-call.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from cabochon.engine.errors import ConfigError

READ_BYTES = 65_536
BACKLOG = 128
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # linger: on, for 0 s


class Front:
    """Listens while it is open. `upstream_port`, on 127.0.0.1, may change: new connections go to it."""

    def __init__(self, host: str, port: int) -> None:
        """port: 0 takes a free one, and keeps it from then on."""
        self.host = host
        self.port = port
        self.upstream_port = 0
        self._server: asyncio.Server | None = None
        self._kept: socket.socket | None = None  # nobody else gets the port while we refuse
        self._connections: dict[int, asyncio.StreamWriter] = {}  # by our port towards the server behind
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_listening(self) -> bool:
        """Whether connections are taken."""
        return self._server is not None

    async def listen(self) -> None:
        """Take connections. Raises ConfigError if the port is not free."""
        if self._server is not None:
            return
        self._give_port_back()
        sock = bind(self.host, self.port)
        self.port = sock.getsockname()[1]
        self._server = await asyncio.start_server(self._accept, sock=sock, backlog=BACKLOG)

    def refuse(self) -> None:
        """Reset every connection and refuse others, until `listen`. The port stays ours."""
        self.stop_listening()
        if self._kept is None:
            self._kept = bind(self.host, self.port, is_listening=False)
        for writer in list(self._connections.values()):
            _reset(writer)

    def stop_listening(self) -> None:
        """Take no further connections; those that are open go on."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def close(self) -> None:
        """End everything, and give the port back."""
        self.stop_listening()
        self._give_port_back()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self, upstream_peer_port: int) -> None:
        """Reset the connection whose bytes come to the server behind from that port."""
        if writer := self._connections.get(upstream_peer_port):
            _reset(writer)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:  # the server behind has just been replaced, or is ending
            writer.transport.abort()
            return
        peer_port = up_writer.get_extra_info("sockname")[1]
        self._connections[peer_port] = writer
        try:
            await _first_done(_pump(reader, up_writer), _pump(up_reader, writer))
        finally:
            del self._connections[peer_port]
            writer.close()
            up_writer.close()

    def _give_port_back(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def bind(host: str, port: int, *, is_listening: bool = True) -> socket.socket:
    """A socket on that address. Raises ConfigError if it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family)
    except OSError as error:
        raise ConfigError(f"host must be an address of this machine, got {host}: {error}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        if is_listening:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"host and port must be free to listen on, {host}:{port} is not ({error.strerror}):"
            " choose another port"
        ) from None
    return sock


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()


async def _first_done(*work: Coroutine[Any, Any, None]) -> None:
    """Run until one of them ends; the others are cancelled."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN: what a peer sees whose connection is cut by force."""
    fileno = writer.get_extra_info("socket").fileno()
    if fileno >= 0:
        with socket.socket(fileno=os.dup(fileno)) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
