"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}; never the input."""

from typing import Any, NamedTuple

from cabochon.engine.errors import (
    Aborted,
    BadAdapter,
    BadPrompt,
    BadSampling,
    ComputeError,
    EngineDead,
    EngineError,
    Overloaded,
    PromptTooLong,
    RequestError,
    UnknownAdapter,
)


class Shape(NamedTuple):
    """How an error looks on the wire."""

    status: int
    type: str
    code: str | None


HTTP: dict[type[EngineError], Shape] = {
    PromptTooLong: Shape(400, "invalid_request_error", "context_length_exceeded"),
    BadPrompt: Shape(400, "invalid_request_error", "invalid_prompt"),
    BadSampling: Shape(400, "invalid_request_error", "invalid_value"),
    BadAdapter: Shape(400, "invalid_request_error", "invalid_adapter"),
    UnknownAdapter: Shape(404, "invalid_request_error", "model_not_found"),
    RequestError: Shape(400, "invalid_request_error", "invalid_value"),
    Overloaded: Shape(429, "rate_limit_error", "overloaded"),
    ComputeError: Shape(500, "server_error", "model_error"),
    Aborted: Shape(500, "server_error", "request_aborted"),
    EngineDead: Shape(503, "server_error", "engine_dead"),
    EngineError: Shape(500, "server_error", "internal_error"),
}


class ApiError(Exception):
    """An error that is found before the engine sees the request."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = "invalid_value",
        headers: dict[str, str] | None = None,
        inner: dict[str, Any] | None = None,
    ) -> None:
        """inner: Azure's `innererror`, by which clients tell a block from other errors."""
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code
        self.headers, self.inner = headers or {}, inner

    def body(self) -> dict[str, Any]:
        """The JSON object to send."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": error if self.inner is None else {**error, "innererror": self.inner}}


def as_api_error(error: Exception) -> ApiError:
    """Any error as one to send. What is not ours is an internal error without details."""
    if isinstance(error, ApiError):
        return error
    for kind in type(error).__mro__:
        shape = HTTP.get(kind)
        if shape is not None:
            headers = {}
            if isinstance(error, Overloaded):
                headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
            return ApiError(
                str(error),
                status=shape.status,
                type=shape.type,
                code=shape.code,
                param=getattr(error, "param", None),
                headers=headers,
            )
    return ApiError(
        "the server made a mistake, its log has the details: report the request id",
        status=500,
        type="server_error",
        code="internal_error",
    )
