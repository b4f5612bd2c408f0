"""What /openapi.json says of bodies and errors: body.parse reads them, of which FastAPI knows nothing."""

from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from cabochon.server.adapters import LoadAdapterRequest, UnloadAdapterRequest
from cabochon.server.body import Body
from cabochon.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from cabochon.server.responses import ResponsesRequest
from cabochon.server.streaming import JSON_TYPE

BODIES: tuple[type[Body], ...] = (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    TokenizeRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
TEXT = {"type": "string"}
EVENTS = {"description": "Server-sent events, as OpenAI's"}
TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "description": "What is wrong",
            "properties": {
                "message": {**TEXT, "description": "What must hold, what was given, what to do"},
                "type": {**TEXT, "description": "Kind of error, in OpenAI's words"},
                "param": {**TEXT_OR_NULL, "description": "The field at fault"},
                "code": {**TEXT_OR_NULL, "description": "Stable word for programs"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_CONTENT = {JSON_TYPE: {"schema": ERROR_SCHEMA}}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is wrong, or must be sent again later", "content": _CONTENT},
    "5XX": {"description": "The server cannot answer", "content": _CONTENT},
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; events with `stream`",
        "content": {"text/event-stream": {"schema": EVENTS}},
    }
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Gauges, counters and histograms", "content": {"text/plain": {"schema": TEXT}}}
}

DONE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Words of success", "content": {"text/plain": {"schema": TEXT}}}
}


def body_of(kind: type[Body]) -> dict[str, Any]:
    """For a route's openapi_extra: its body."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": schema}}}}


def with_bodies(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Add the schemas that body_of refers to, with the fields that are accepted without effect."""

    @cache
    def extended() -> dict[str, Any]:
        schema = openapi()
        models: list[Any] = [(kind, "validation") for kind in BODIES]
        _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
        for kind in BODIES:
            properties = definitions["$defs"][kind.__name__]["properties"]
            for name in sorted(kind.no_effect):
                properties[name] = {"description": "Accepted, without effect"}
            for name, values in kind.asks_nothing.items():
                known = {"enum": list(values)} if values else {"type": "null"}
                properties[name] = {**known, "description": "Not supported: only what asks for nothing"}
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return schema

    return extended
