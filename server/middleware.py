"""Around every request: its id, the API key, a last word on crashes, one line in the log.

Plain ASGI, so that streams pass untouched. Handlers leave in `log_fields` what their line should say beside,
and find in `trace` the spans of their request, None while tracing is off.
"""

import logging
import re
import time
import traceback
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cabochon.server.auth import ApiKeys
from cabochon.server.errors import ApiError, as_api_error
from cabochon.server.streaming import JsonResponse

if TYPE_CHECKING:
    from cabochon.server.spans import Tracing

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
QUIET = ("/metrics", "/health", "/-/healthz")  # probes and scrapes, many a second
MAX_LOGGED_PATH = 256
CLIENT_GONE = 499  # nginx's code: no answer was started


class Border:
    """X-Request-Id in and out, 401 without a key, 500 for a bug, an access line without any content."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, tracing: "Tracing | None" = None) -> None:
        self._app = app
        self._keys = keys
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        log_fields: dict[str, Any] = {}
        trace = None
        if self._tracing is not None and path not in QUIET:
            trace = self._tracing.begin(scope["method"], headers)
            log_fields["trace_id"] = trace.trace_id
        scope.setdefault("state", {}).update(request_id=request_id, log_fields=log_fields, trace=trace)
        started_s, status = time.monotonic(), CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._keys.check(path, headers.get("authorization"))
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # the border: nothing gets past it without an answer and a line in the log
            if not isinstance(error, ApiError):
                _log_bug(request_id, error)
            if status == CLIENT_GONE:
                answer = as_api_error(error)
                response = JsonResponse(answer.body(), answer.status, answer.headers)
                await response(scope, receive, send_with_id)
        finally:
            if trace is not None:
                trace.end(getattr(scope.get("route"), "path", None), status, request_id)
            if path not in QUIET:
                log_fields["ms"] = round((time.monotonic() - started_s) * 1e3)
                _log(scope["method"], quote(path[:MAX_LOGGED_PATH]), request_id, status, log_fields)


def _log(method: str, path: str, request_id: str, status: int, fields: dict[str, Any]) -> None:
    """One line: stable words first, so that it can be searched; the same as fields of a JSON line."""
    named = {"id": request_id, "method": method, "path": path, "status": status, **fields}
    text = " ".join(f"{name}={value}" for name, value in named.items())
    logger.info("request %s", text, extra={"fields": named})


def _log_bug(request_id: str, error: Exception) -> None:
    """Where, not what: the messages of exceptions may quote a prompt."""
    while (cause := error.__cause__ or error.__context__) is not None and isinstance(cause, Exception):
        error = cause
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request failed id=%s error=%s at\n%s", request_id, type(error).__name__, frames)
