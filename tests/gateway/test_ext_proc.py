"""What arrives at a server behind Envoy and the picker, byte for byte."""

from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import COMPLETIONS, LiveServer
from gateway import PROBE_INTERVAL_S, Gateway, address
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tools import need_gateway_tools

pytestmark = pytest.mark.slow

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CONTROL = (
    "x-llm-d-inference-objective",
    "x-llm-d-inference-fairness-id",
    "x-llm-d-slo-ttft-ms",
    "x-gateway-inference-objective",
    "x-slo-tpot-ms",
)
BODIES = [
    b'{ "max_tokens":1,\n "prompt":"\\u00e4", "model" : "demo", "temperature": 0.10 }',
    b'{"model": "demo", "max_tokens": 1, "prompt": "%s"}' % (b"ab" * 500),
    b'{"model": "demo", "max_tokens": 1, "prompt": "hello"}'.ljust(62_000),  # one piece of the picker's
    b'{"model": "demo", "max_tokens": 1, "prompt": "hello"}'.ljust(62_001),
]


class Seen:
    """A server, and the headers and body of its last request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.headers: dict[str, str] = {}
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != COMPLETIONS:
            return await self._app(scope, receive, send)
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.body = b""

        async def read() -> Message:
            message = await receive()
            self.body += message.get("body", b"")
            return message

        await self._app(scope, read, send)


@pytest.fixture(scope="module")
def passed() -> Iterator[tuple[Gateway, Seen, str]]:
    """A gateway, what its only server sees, and that server's address."""
    need_gateway_tools()
    seen: list[Seen] = []

    def around(app: ASGIApp) -> ASGIApp:
        seen.append(Seen(app))
        return seen[0]

    with (
        LiveServer(around, served_model_name=("demo",)) as server,
        Gateway(server.url, probe_interval_s=PROBE_INTERVAL_S) as gateway,
    ):
        yield gateway, seen[0], address(server.url)


@pytest.mark.parametrize("body", BODIES, ids=len)
def test_a_body_arrives_byte_for_byte(passed: tuple[Gateway, Seen, str], body: bytes) -> None:
    gateway, seen, _ = passed
    headers = {"content-type": "application/json"}
    answer = gateway.http.post(COMPLETIONS, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert seen.body == body


def test_a_body_of_unknown_length_arrives_whole(passed: tuple[Gateway, Seen, str]) -> None:
    gateway, seen, _ = passed
    parts = [b'{"model": "demo", ', b'"prompt": "hello", ' + b" " * 100_000, b'"max_tokens": 1}']
    headers = {"content-type": "application/json"}
    answer = gateway.http.post(COMPLETIONS, content=iter(parts), headers=headers)
    assert answer.status_code == 200, answer.text
    assert seen.body == b"".join(parts)


def test_control_headers_end_at_the_picker_and_others_pass(passed: tuple[Gateway, Seen, str]) -> None:
    gateway, seen, picked = passed
    sent: dict[str, Any] = {name: "1" for name in CONTROL}
    sent |= {"x-gateway-destination-endpoint": "127.0.0.1:9", "authorization": "Bearer key"}
    sent |= {"x-request-id": "mine", "traceparent": TRACE}
    body = {"model": "demo", "prompt": "hello", "max_tokens": 1}
    answer = gateway.http.post(COMPLETIONS, json=body, headers=sent)
    assert answer.status_code == 200
    assert not set(CONTROL) & set(seen.headers)
    assert seen.headers["x-gateway-destination-endpoint"] == picked
    assert seen.headers["traceparent"] == TRACE
    assert seen.headers["authorization"] == "Bearer key"
    assert seen.headers["x-request-id"] == answer.headers["x-request-id"]
