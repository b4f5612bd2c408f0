"""The client keeps the pieces of an answer, and says what is wrong with a connection."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cabochon.engine.errors import ConfigError
from cabochon.server.gateway.http_client import Answer, Connection, HttpFailure, Target, ask, parse_url

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def serving(handler: Handler, use: Callable[[Target], Awaitable[Any]]) -> Any:
    """What `use` returns with a server whose connections `handler` gets."""

    handled: list[asyncio.Task[None]] = []

    async def run() -> Any:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handled.append(asyncio.ensure_future(handler(reader, writer)))

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        async with server:
            target = Target("127.0.0.1", server.sockets[0].getsockname()[1])
            try:
                return await asyncio.wait_for(use(target), 5)
            finally:
                await asyncio.gather(*handled)

    return asyncio.run(run())


def sending(*parts: bytes) -> Handler:
    """Answers the first request by these parts, a moment after each other, and closes."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    return handler


def answer_to(*parts: bytes) -> Answer:
    result = serving(sending(*parts), lambda target: ask(target, "GET", "/"))
    assert isinstance(result, Answer)
    return result


def test_chunks_stay_as_the_server_wrote_them() -> None:
    answer = answer_to(CHUNKED + b"3\r\nabc\r\n2\r\nde", b"\r\n1\r\n", b"f\r\n0\r\n\r\n")
    assert answer.pieces == [b"abc", b"de", b"f"]
    assert (answer.status, answer.body) == (200, b"abcdef")


def test_a_body_without_length_ends_with_the_connection() -> None:
    assert answer_to(b"HTTP/1.1 404 Not Found\r\nX-A: b\r\n\r\nab", b"c").body == b"abc"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([CHUNKED + b"3\r\nabc\r\n"], "closed the connection before its answer was whole"),
        ([PLAIN[:-1]], "closed the connection before its answer was whole"),
        ([b""], "closed the connection before its answer was whole"),
        ([b"SSH-2.0-OpenSSH\r\n"], "the answer is not HTTP/1.1"),
    ],
)
def test_half_an_answer_is_a_failure(parts: list[bytes], message: str) -> None:
    with pytest.raises(HttpFailure, match=message):
        answer_to(*parts)


def test_nobody_at_the_port_is_a_failure() -> None:
    async def closed() -> Target:
        server = await asyncio.start_server(sending(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return Target("127.0.0.1", port)

    async def run() -> Answer:
        return await ask(await closed(), "GET", "/")

    with pytest.raises(HttpFailure, match=r"no connection to http://127\.0\.0\.1:"):
        asyncio.run(run())


def test_a_connection_is_used_again_and_replaced_when_the_server_has_closed_it() -> None:
    opened = []

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(PLAIN)
        writer.close()

    async def use(target: Target) -> list[int]:
        async with Connection(target) as connection:
            return [(await connection.ask("GET", "/")).status for _ in range(4)]

    assert serving(twice, use) == [200] * 4
    assert len(opened) == 2


def test_requests_have_the_key_a_length_and_no_accept_header() -> None:
    heads: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(PLAIN)
        writer.close()

    async def use(target: Target) -> None:
        named = Target(target.host, target.port, key="secret")
        await ask(named, "POST", "/x", {"a": 1})
        await ask(named, "GET", "/metrics", with_key=False)

    serving(handler, use)
    assert b"Authorization: Bearer secret\r\n" in heads[0]
    assert b"Content-Length: 8\r\n" in heads[0]
    assert b"Authorization" not in heads[1]
    assert not any(b"accept" in head.lower() for head in heads)


def test_a_url_is_a_host_and_a_port() -> None:
    assert parse_url("http://localhost:8000/") == Target("localhost", 8000)
    assert parse_url("https://a", "k") == Target("a", 443, is_tls=True, key="k")
    assert parse_url("http://[::1]:80").url == "http://[::1]:80"


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "http://a/v1", "ftp://a", "http://a:x", "http://a?b"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"a URL must be http://HOST:PORT without a path, got"):
        parse_url(url)
