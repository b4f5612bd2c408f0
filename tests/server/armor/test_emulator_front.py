"""The port before the gRPC server, with plain sockets: bytes pass, connections end as asked for."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from cabochon.server.armor.emulator_front import Front

MANY_BYTES = bytes(range(256)) * 8192  # 2 MiB: more than sockets hold


def with_echo(work: Callable[[Front, list[int]], Awaitable[None]]) -> None:
    """work: gets a front before a server that sends all back, and the ports which that was asked from."""

    async def run() -> None:
        ports: list[int] = []

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ports.append(writer.get_extra_info("peername")[1])
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
            writer.close()

        front = Front("127.0.0.1", 0)
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            front.upstream_port = server.sockets[0].getsockname()[1]
            await front.listen()
            try:
                await work(front, ports)
            finally:
                await front.close()

    asyncio.run(run())


async def connect(front: Front) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(b"ping")
    assert await reader.readexactly(4) == b"ping"
    return reader, writer


def test_all_bytes_pass_and_the_end_too() -> None:
    async def work(front: Front, _ports: list[int]) -> None:
        reader, writer = await connect(front)
        reading = asyncio.create_task(reader.readexactly(len(MANY_BYTES)))
        writer.write(MANY_BYTES)
        assert await reading == MANY_BYTES
        writer.close()
        await writer.wait_closed()

    with_echo(work)


def test_one_connection_is_reset_and_another_goes_on() -> None:
    async def work(front: Front, ports: list[int]) -> None:
        (first, first_writer), (second, second_writer) = [await connect(front) for _ in range(2)]
        front.reset(ports[0])
        front.reset(1)  # nobody's
        with pytest.raises(ConnectionResetError):  # an orderly end would be b""
            await first.read()
        second_writer.write(b"pong")
        assert await second.readexactly(4) == b"pong"
        for writer in (first_writer, second_writer):
            writer.close()

    with_echo(work)


def test_while_it_refuses_it_keeps_its_port() -> None:
    async def work(front: Front, _ports: list[int]) -> None:
        reader, writer = await connect(front)
        for _ in range(2):
            front.refuse()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", front.port)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", front.port))
        await front.listen()
        (await connect(front))[1].close()

    with_echo(work)


def test_a_connection_is_dropped_if_nobody_is_behind() -> None:
    async def work(front: Front, _ports: list[int]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            front.upstream_port = free.getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            assert await reader.read() == b""
            writer.close()

    with_echo(work)
