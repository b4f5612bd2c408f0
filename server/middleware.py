"""Around every request: its id, the API key, one line in the log. Plain ASGI, so that streams pass untouched."""

import logging
import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cabochon.server.auth import ApiKeys
from cabochon.server.errors import ApiError
from cabochon.server.streaming import JsonResponse

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
QUIET = ("/metrics", "/health", "/-/healthz")  # probes and scrapes, many a second


class Border:
    """X-Request-Id in and out, 401 without a key, an access line without any content."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started_s, status = time.monotonic(), 499  # no answer was started: the client went away

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._keys.check(scope["path"], headers.get("authorization"))
        except ApiError as error:
            await JsonResponse(error.body(), error.status)(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)
        if scope["path"] not in QUIET:
            elapsed_ms = (time.monotonic() - started_s) * 1e3
            logger.info(
                "request id=%s path=%s status=%d ms=%.0f", request_id, scope["path"], status, elapsed_ms
            )
