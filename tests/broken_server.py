"""A server in a thread that breaks one rule at a time, between the application and the network."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fake_server import LiveServer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Change = Callable[[Message], list[Message]]


def status(code: int) -> Change:
    """Another status."""

    def change(message: Message) -> list[Message]:
        return [{**message, "status": code} if message["type"] == "http.response.start" else message]

    return change


def header(name: str, value: str) -> Change:
    """Another value of a header."""

    def change(message: Message) -> list[Message]:
        if message["type"] != "http.response.start":
            return [message]
        kept = [pair for pair in message["headers"] if pair[0] != name.encode()]
        return [{**message, "headers": [*kept, (name.encode(), value.encode())]}]

    return change


def text(pattern: bytes, new: bytes) -> Change:
    """Another body: what matches becomes `new`."""

    def change(message: Message) -> list[Message]:
        body = message.get("body", b"")
        return [{**message, "body": re.sub(pattern, new, body)} if body else message]

    return change


def torn(message: Message) -> list[Message]:
    """Each piece of the body in two."""
    body = message.get("body", b"")
    if len(body) < 2:
        return [message]
    middle = len(body) // 2
    return [{**message, "body": body[:middle], "more_body": True}, {**message, "body": body[middle:]}]


def lost(message: Message) -> list[Message]:
    """A body without its end: the connection closes."""
    if message["type"] == "http.response.body" and not message.get("more_body"):
        raise RuntimeError("as if the worker had died")
    return [message]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with the answers of one path."""

    path: str
    change: Change = lambda message: [message]
    delay_s: float = 0.0
    is_deaf: bool = False  # never hears that the client has gone


class BrokenServer(LiveServer):
    """Over a FakeEngine that is slow enough to be looked at, and has what the gateway asks for."""

    def __init__(self, **options: Any) -> None:
        self.fault: Fault | None = None
        super().__init__(lambda app: self._around(app), **options)
        self.faults.delay_s = 0.01
        self.faults.cached_tokens = 16
        self.engine.snapshot = replace(self.engine.snapshot, pages_used=256)

    @contextmanager
    def broken(self, fault: Fault | None) -> Iterator["BrokenServer"]:
        """While the context lasts."""
        self.fault = fault
        try:
            yield self
        finally:
            self.fault = None

    def _around(self, app: ASGIApp) -> ASGIApp:
        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            fault = self.fault
            if fault is None or scope["type"] != "http" or scope["path"] != fault.path:
                return await app(scope, receive, send)

            async def changed(message: Message) -> None:
                if message["type"] == "http.response.start":  # its length may change
                    kept = [pair for pair in message["headers"] if pair[0] != b"content-length"]
                    message = {**message, "headers": kept}
                for one in fault.change(message):
                    await send(one)

            async def heard() -> Message:
                message = await receive()
                if fault.is_deaf and message["type"] == "http.disconnect":
                    await asyncio.sleep(10)
                return message

            await asyncio.sleep(fault.delay_s)
            await app(scope, heard, changed)

        return call
