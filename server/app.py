"""The FastAPI application over any Engine: OpenAI's endpoints, probes, metrics."""

import asyncio
import html
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from cabochon.engine.detokenizer import Detokenizer
from cabochon.engine.errors import EngineError
from cabochon.server.adapters import LoadAdapterRequest, UnloadAdapterRequest
from cabochon.server.auth import ApiKeys
from cabochon.server.body import Parsed, parse
from cabochon.server.errors import ApiError, as_api_error
from cabochon.server.middleware import CLIENT_GONE, Border
from cabochon.server.openapi import DONE, ERRORS, METRICS, STREAM, body_of, with_bodies
from cabochon.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    check_turns,
)
from cabochon.server.responses import ResponsesRequest
from cabochon.server.service import VERSION, Service
from cabochon.server.streaming import JsonResponse, read_body
from cabochon.server.tools import tool_use
from cabochon.server.ui import add_ui

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# FastAPI's own spans and logs, which quote exceptions, go to whatever global provider the process has (Ray
# may set one) or the environment names. Ours (`spans`) quote nothing. A FastAPI too old to know the argument
# has none
NO_TELEMETRY: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
INLINE_BYTES = 16 * 2**10  # a millisecond mostly; a larger body is parsed aside, so that streams go on


def build_app(service: Service) -> FastAPI:
    """All routes. The caller starts and stops the engine, and drains through service.lifecycle."""
    app = FastAPI(
        title="Cabochon",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        telemetry=NO_TELEMETRY,
    )
    app.openapi = with_bodies(app.openapi)  # type: ignore[method-assign]  # the documented way to extend it
    app.state.service = service
    app.add_middleware(Border, keys=ApiKeys(service.config.api_key_file), tracing=service.tracing)
    _add_generation(app, service)
    _add_tokenizer(app, service)
    _add_models(app, service)
    _add_adapters(app, service)
    _add_operations(app, service)
    if service.config.ui:
        add_ui(app)
    for kind in (ApiError, EngineError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), responses=STREAM)
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        body = await _read(ChatRequest, request, service)
        return await service.respond(await service.chat(body, request), request)

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest), responses=STREAM)
    async def completions(request: Request) -> Response:
        """Continue one prompt or several, text or token ids."""
        body = await _read(CompletionRequest, request, service)
        return await service.respond(await service.completion(body, request), request)

    @app.post("/v1/responses", openapi_extra=body_of(ResponsesRequest), responses=STREAM)
    async def responses(request: Request) -> Response:
        """Answer a conversation that the body brings whole: nothing is stored."""
        body = await _read(ResponsesRequest, request, service)
        return await service.respond(await service.response(body, request), request)

    @app.post("/v1/chat/completions/render", openapi_extra=body_of(ChatRequest))
    async def render_chat(request: Request) -> Response:
        """The tokens of a chat, without running it."""
        body = await _read(ChatRequest, request, service)
        return JsonResponse((await service.render(body, _id(request)))[0])

    @app.post("/v1/completions/render", openapi_extra=body_of(CompletionRequest))
    async def render_completion(request: Request) -> Response:
        """The tokens of each prompt, without running it."""
        body = await _read(CompletionRequest, request, service)
        return JsonResponse(await service.render(body, _id(request)))


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt, or of messages through the chat template."""
        body = await _read(TokenizeRequest, request, service)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("exactly one of prompt and messages must be given: send one", param="prompt")
        if body.tools and body.messages is None:
            raise ApiError("tools need messages: send those, or leave tools out", param="tools")
        limit, prompts = service.engine.info.max_model_len, service.prompts
        if body.messages is not None:
            check_turns(body.messages)
            use = tool_use([tool.function for tool in body.tools], "auto")
            ids = await prompts.of_messages(
                body.messages,
                limit=limit,
                functions=use.functions if use is not None else (),
                add_generation_prompt=body.add_generation_prompt,
            )
        else:
            ids = await prompts.encode(
                body.prompt or "", limit=limit, add_special_tokens=body.add_special_tokens
            )
        answer = {"count": len(ids), "max_model_len": limit, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [prompts.tokenizer.id_to_token(token_id) for token_id in ids]
        return JsonResponse(answer)

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        body = await _read(DetokenizeRequest, request, service)
        service.check_model(body.model)
        size, limit = service.engine.info.vocab_size, service.engine.info.max_model_len
        if len(body.tokens) > limit:
            raise ApiError(
                f"tokens must have at most {limit} ids, got {len(body.tokens)}: send fewer", param="tokens"
            )
        if any(not 0 <= token_id < size for token_id in body.tokens):
            raise ApiError(f"tokens must be ids in [0, {size}): correct them", param="tokens")
        detokenizer = Detokenizer(service.prompts.token_bytes, skip_special_tokens=False)
        return JsonResponse({"prompt": detokenizer.feed(body.tokens) + detokenizer.flush()})


def _add_models(app: FastAPI, service: Service) -> None:
    def model(name: str) -> dict[str, Any]:
        adapter = service.adapters.get(name)
        return {
            "id": name,
            "object": "model",
            "created": service.started if adapter is None else adapter.created,
            "owned_by": "cabochon",
            "root": service.engine.info.model if adapter is None else adapter.info.path,
            "parent": None if adapter is None else service.names[0],
            "max_model_len": service.engine.info.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The served model, under each of its names, and its adapters."""
        names = (*service.names, *(adapter.info.name for adapter in service.adapters))
        return JsonResponse({"object": "list", "data": [model(name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """One model."""
        return JsonResponse(model(service.check_model(name)))


def _add_adapters(app: FastAPI, service: Service) -> None:
    def check() -> None:
        service.adapters.check_is_on()
        service.lifecycle.check_open()

    @app.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadAdapterRequest), responses=DONE)
    async def load_lora_adapter(request: Request) -> Response:
        """Serve an adapter from a directory below --lora-dir. Off without that option."""
        check()
        body = await _read(LoadAdapterRequest, request, service)
        return PlainTextResponse(await service.adapters.load(body))

    @app.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadAdapterRequest), responses=DONE)
    async def unload_lora_adapter(request: Request) -> Response:
        """Serve an adapter no more; its running requests go on. Off without --lora-dir."""
        check()
        body = await _read(UnloadAdapterRequest, request, service)
        return PlainTextResponse(await service.adapters.unload(body))


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.head("/-/healthz", include_in_schema=False)
    @app.get("/health")
    @app.get("/-/healthz")
    async def health() -> Response:
        """200 if requests should be sent here, else 503 with the reason."""
        status, word = service.lifecycle.health()
        return JsonResponse({"status": word}, status)

    @app.get("/version")
    async def version() -> Response:
        """Of Cabochon."""
        return JsonResponse({"version": VERSION})

    @app.get("/metrics", responses=METRICS)
    async def metrics() -> Response:
        """Prometheus text format; 503 from a dead engine."""
        status, text = service.scrape()
        return Response(text, status, media_type=METRICS_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """A list of the routes that loads nothing from anywhere; /openapi.json has every field."""
        rows = [
            f"<tr><td>{method.upper()}<td>{html.escape(path)}<td>{html.escape(route['description'])}"
            for path, routes in app.openapi()["paths"].items()
            for method, route in routes.items()
        ]
        title = f"Cabochon {VERSION}: {html.escape(service.names[0])}"
        return HTMLResponse(
            f"<!doctype html><title>{title}</title><h1>{title}</h1><table>{''.join(rows)}</table>"
            "<p><a href='openapi.json'>openapi.json</a></p>"
        )


async def _read(kind: type[Parsed], request: Request, service: Service) -> Parsed:
    raw = await read_body(request, service.config.max_body_bytes)
    if len(raw) <= INLINE_BYTES:
        return parse(kind, raw)
    return await asyncio.to_thread(parse, kind, raw)


def _id(request: Request) -> str:
    return str(request.state.request_id)


async def _answer_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        what = {404: "path", 405: "method"}.get(error.status_code, "request")
        error = ApiError(
            f"the {what} must be one of this server's: see /docs",
            status=error.status_code,
            code=f"unknown_{what}",
            headers=dict(error.headers or {}),
        )
    answer = as_api_error(error)
    return JsonResponse(answer.body(), answer.status, answer.headers)


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # nobody reads it
