"""Probes and scrapes of a Ray Serve replica, answered before Serve's admission.

ASGI middleware (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH) around a replica's HTTP server, and around the
proxy on the head, which has no engine. It runs on Serve's loop; engine and app belong to another loop and
thread, so all it does is read.
"""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cabochon.server.app import METRICS_TYPE
from cabochon.server.service import Service
from cabochon.server.streaming import JsonResponse

SERVE_HEALTH = "/-/healthz"  # Serve's own answer on a replica's port
DRAINING = b"DRAINING"  # it says so with 503 from the moment that the replica is to stop


class Replica:
    """What this process serves, if it is a replica, and the server that Serve has put in front of it."""

    def __init__(self) -> None:
        self.service: Service | None = None
        self._server: tuple[ASGIApp, asyncio.AbstractEventLoop] | None = None

    def put_in_front(self, server: ASGIApp) -> None:
        """Called on the server's loop."""
        self._server = server, asyncio.get_running_loop()

    async def is_draining(self) -> bool:
        """Whether Serve wants the replica to end. Nobody tells user code, so ask. From any loop."""
        if self._server is None:
            return False
        server, loop = self._server
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_says_draining(server), loop))


replica = Replica()  # one per process; empty in the head's proxy


class FastPath:
    """/metrics, /health and /-/healthz from the last snapshot; all else passes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        replica.put_in_front(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        response: Response | None = None
        if path == "/metrics":
            response = _metrics()
        elif path in ("/health", SERVE_HEALTH):
            response = await _health(path, self._app)
        await (response or self._app)(scope, receive, _with_one_id(send))


def middlewares() -> list[Middleware]:
    """What Serve calls in each process with an HTTP server."""
    return [Middleware(FastPath)]


def _metrics() -> Response:
    if replica.service is None:
        return PlainTextResponse("only replicas have metrics: scrape their ports\n", 404)
    status, text = replica.service.scrape()
    return Response(text, status, media_type=METRICS_TYPE)


async def _health(path: str, server: ASGIApp) -> Response | None:
    """The engine's truth, then Serve's word if it drains. Nothing if the answer is the proxy's own.

    Serve also says 503 until its first check of a new replica has ended, and that one waits for probes.
    """
    if replica.service is None:
        return None if path == SERVE_HEALTH else PlainTextResponse("only replicas have /health\n", 404)
    status, word = replica.service.lifecycle.health()
    if status != 200:
        return JsonResponse({"status": word}, status)
    if await _says_draining(server):
        return PlainTextResponse(DRAINING, 503)
    return PlainTextResponse("success")  # the word that KubeRay's probe looks for


def _at(path: str) -> dict[str, Any]:
    return {"path": path, "raw_path": path.encode()}


def _with_one_id(send: Send) -> Send:
    """Serve puts its X-Request-Id beside the app's, which is the same."""

    async def send_message(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if (request_id := headers.get("x-request-id")) is not None:
                headers["X-Request-Id"] = request_id
        await send(message)

    return send_message


async def _says_draining(server: ASGIApp) -> bool:
    scope: MutableMapping[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "root_path": "",
        "query_string": b"",
        "headers": [],
        **_at(SERVE_HEALTH),
    }
    body = b""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    await server(scope, receive, send)
    return body == DRAINING
