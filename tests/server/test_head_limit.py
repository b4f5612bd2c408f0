"""A request head without end is cut off, and nothing else."""

import asyncio
import socket

import pytest
from fake_server import fake_service, request_bytes

from cabochon.server import serve
from cabochon.server.head_limit import MAX_HEAD_BYTES


def exchange(parts: list[bytes]) -> bytes:
    """Send to a server of our own protocol, until it closes. Returns what it said."""

    async def main() -> bytes:
        sock = serve.bind("127.0.0.1", 0)
        port = sock.getsockname()[1]
        server = asyncio.create_task(serve.serve_engine(fake_service(), sock))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = b""
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)
            answer = await asyncio.wait_for(reader.read(), 20)
        except ConnectionError:
            pass
        writer.close()
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        sock.close()  # a server that is cancelled leaves it open
        return answer

    return asyncio.run(main())


@pytest.mark.parametrize("start", [b"GET /" + b"a" * 10, b"GET / HTTP/1.1\r\nX-A: "], ids=["url", "header"])
def test_a_head_without_end_gets_431(start: bytes) -> None:
    answer = exchange([start, *[b"a" * 8192] * (MAX_HEAD_BYTES // 8192 + 1)])
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"must have at most 65536 bytes: send less" in answer


@pytest.mark.parametrize("piece", [8192, 100_000, 10**7])
def test_a_long_body_is_no_long_head(piece: int) -> None:
    whole = request_bytes("/tokenize", {"prompt": "hello " * 40_000}).replace(
        b"Host", b"Connection: close\r\nHost"
    )
    answer = exchange([whole[i : i + piece] for i in range(0, len(whole), piece)])
    assert b"maximum context length" in answer


def test_requests_on_one_connection_have_a_head_each() -> None:
    one = b"GET /version HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 30_000 + b"\r\n\r\n"
    last = one.replace(b"Host", b"Connection: close\r\nHost")
    assert exchange([one, one, one, last]).count(b"HTTP/1.1 200") == 4


def test_the_port_is_taken_as_soon_as_it_is_bound() -> None:
    with serve.bind("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname(), timeout=5):
        pass
