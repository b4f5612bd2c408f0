"""When bytes leave, and what happens when nobody reads them any more."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest
from fake_server import CHAT, COMPLETIONS, LiveServer, request_bytes, wait_until
from starlette.requests import ClientDisconnect

from cabochon.server import streaming
from cabochon.server.streaming import EventStream, event, or_disconnect

PROMPT = {"prompt": [300], "max_tokens": 1000}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_its_requests(live: LiveServer, stream: bool, n: int) -> None:
    live.faults.delay_s = 0.01
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall(request_bytes(COMPLETIONS, {**PROMPT, "stream": stream, "n": n}))
        wait_until(lambda: len(live.engine.open) == n)
        if stream:
            assert sock.recv(10)
    left_s = time.monotonic()
    wait_until(lambda: not live.engine.open)
    assert time.monotonic() - left_s < 0.5
    assert len(live.engine.aborted) == n
    assert live.service.lifecycle.num_open == 0


def test_a_client_that_goes_away_before_the_first_token_frees_its_request(live: LiveServer) -> None:
    live.faults.is_paused = True
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall(
            request_bytes(CHAT, {"messages": [{"role": "user", "content": "hello"}], "stream": True})
        )
        wait_until(lambda: live.engine.open)
    wait_until(lambda: live.engine.aborted)
    assert not live.engine.open


def test_no_byte_leaves_before_the_first_token(live: LiveServer) -> None:
    live.faults.is_paused = True
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall(request_bytes(COMPLETIONS, {**PROMPT, "max_tokens": 1, "stream": True}))
        wait_until(lambda: live.engine.open)
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        live.faults.is_paused = False
        sock.settimeout(10)
        assert sock.recv(15) == b"HTTP/1.1 200 OK"


def test_tokens_arrive_one_by_one(live: LiveServer) -> None:
    live.faults.delay_s = 0.05
    arrived_s = []
    with live.stream(COMPLETIONS, {**PROMPT, "max_tokens": 4}) as answer:
        for _ in answer.iter_raw():
            arrived_s.append(time.monotonic())
    assert arrived_s[-1] - arrived_s[0] > 0.1


def test_a_dying_engine_ends_streams_with_an_error_event(live: LiveServer) -> None:
    live.faults.dies_after_tokens = 5
    text = live.complete([300], max_tokens=100, stream=True).text
    assert "[DONE]" not in text
    assert json.loads(text.split("data: ")[-1])["error"]["code"] == "engine_dead"


def test_a_dying_engine_ends_waiting_requests_with_a_status(live: LiveServer) -> None:
    live.faults.dies_after_tokens = 5
    answer = live.complete([300], max_tokens=100)
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"


def test_an_event_is_one_line_of_compact_json() -> None:
    assert event({"a": "x\ny", "b": [1, "é"]}) == 'data: {"a":"x\\ny","b":[1,"é"]}\n\n'.encode()


def test_work_that_fails_raises_its_own_error() -> None:
    async def never() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(or_disconnect(never, fail()))


def test_work_is_cancelled_when_the_client_goes() -> None:
    ended = []

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(ClientDisconnect):
        asyncio.run(or_disconnect(gone, work()))
    assert ended


class Client:
    """Reads what comes until event number `stuck_at`, and then nothing more."""

    def __init__(self, stuck_at: int | None = None) -> None:
        self.bodies: list[bytes] = []
        self._stuck_at = stuck_at

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            if len(self.bodies) == self._stuck_at:
                await asyncio.Event().wait()
            self.bodies.append(message["body"])


def stream_to(client: Client, pause_s: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Three events with pauses between. Returns whether their source was closed before its end."""
    monkeypatch.setattr(streaming, "SEND_TIMEOUT_S", 0.1)
    ends: list[bool] = []

    async def source() -> AsyncGenerator[bytes, None]:
        is_early = True
        try:
            for number in range(3):
                yield b"%d" % number
                await asyncio.sleep(pause_s)
            is_early = False
        finally:
            ends.append(is_early)

    async def main() -> list[bool]:
        events = source()  # held: nobody else closes it
        answer = EventStream(events)({"type": "http"}, client.receive, client.send)
        await asyncio.wait_for(answer, 10)
        return list(ends)

    return asyncio.run(main()) == [True]


def test_who_does_not_read_for_long_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    client, started_s = Client(stuck_at=1), time.monotonic()
    assert stream_to(client, 0, monkeypatch), "its source is closed, which aborts its requests"
    assert client.bodies == [b"0"]
    assert 0.1 <= time.monotonic() - started_s < 0.4


def test_who_waits_for_a_slow_source_does_not_count_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    assert not stream_to(client, 0.3, monkeypatch)
    assert client.bodies == [b"0", b"1", b"2", b""]
