"""Bodies and answers: server-sent events, JSON, and waiting with an eye on the client."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cabochon.server.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
JSON_TYPE = "application/json"
SEND_TIMEOUT_S = 60.0  # no byte taken for that long: the client has gone, or holds a place that others need

encode_json = msgspec.json.Encoder().encode


def event(content: object) -> bytes:
    """One whole event in compact JSON."""
    return b"data: " + encode_json(content) + b"\n\n"


class JsonResponse(Response):
    """Compact JSON, as endpoint pickers parse it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError: 415 if it is not plain JSON, 413 as soon as it is too long.

    What Content-Length says is only believed when it is bad news.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        raise ApiError(
            f"Content-Type must be {JSON_TYPE}: set this header", status=415, code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(
            "the body must not be compressed: send it as it is", status=415, code="unsupported_media_type"
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        f"the body must have at most {max_bytes} bytes: send less, or raise max_body_bytes",
        status=413,
        code="body_too_large",
        headers={"Connection": "close"},  # the rest of the body is not read
    )


async def or_disconnect(receive: Receive, work: Awaitable[T], *signs: Awaitable[None]) -> T:
    """Await `work`; cancel it and raise ClientDisconnect if the client goes away. The body must be read.

    signs: that end if it must be taken for gone.
    """
    task = asyncio.ensure_future(work)
    watches = [asyncio.ensure_future(sign) for sign in (_gone(receive), *signs)]
    try:
        await asyncio.wait({task, *watches}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, *watches):
            each.cancel()
        await asyncio.gather(task, *watches, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come; closes their source when the client goes away."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        self._events = events
        self._sending_s: float | None = None  # since when an event is being sent
        self.background = None
        self.status_code = 200
        kind = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        self.init_headers({**kind, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await or_disconnect(receive, self._send_all(send), self._is_stuck())
        except (ClientDisconnect, OSError):
            pass  # the source is closed below, which aborts its requests
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._events:
            self._sending_s = time.monotonic()
            await send({"type": "http.response.body", "body": part, "more_body": True})
            self._sending_s = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _is_stuck(self) -> None:
        """Ends when the client has not read for too long. A timer for each event costs more than its JSON."""
        while self._sending_s is None or time.monotonic() - self._sending_s < SEND_TIMEOUT_S:
            await asyncio.sleep(SEND_TIMEOUT_S / 4)
