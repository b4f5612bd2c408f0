"""OpenTelemetry spans of a request: server, then queue, prefill and decode of each choice.

Names follow the GenAI semantic conventions, and vLLM where those have none (gen_ai.latency.*,
gen_ai.request.id). No prompt, completion, path or message of an exception is in a span. The provider is our
own: the global one belongs to whoever runs us. Only `tracing` imports this file, when an endpoint is given.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from cabochon.server.formats import Head
from cabochon.server.generation import Choice

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 5.0  # at the end: a collector that is gone must not hold up a drain
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}


class Tracing:
    """Begins traces; a thread of the SDK sends them, and drops them when the collector cannot follow."""

    def __init__(self, processor: SpanProcessor) -> None:
        """OTEL_* variables (sampler, resource, batches, headers) are the SDK's own and hold."""
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "cabochon"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("cabochon")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Spans go to a collector by OTLP/HTTP."""
        url = endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
        return cls(BatchSpanProcessor(OTLPSpanExporter(url)))

    def begin(self, method: str, headers: Mapping[str, str]) -> "Trace":
        """The trace of a request, a child of its `traceparent`, whose sampled flag holds."""
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return Trace(self._tracer, self._propagator.extract(carrier, Context()), method)

    async def close(self) -> None:
        """Send what is left, for FLUSH_TIMEOUT_S at most. No trace may begin after it."""
        loop, is_done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(is_done.set)

        # A daemon, not the loop's executor, whose threads are waited for at exit
        threading.Thread(target=shut_down, daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await is_done.wait()
        except TimeoutError:
            logger.warning("traces lost, the collector took longer than %g s", FLUSH_TIMEOUT_S)


class Trace:
    """The spans of one request. Times are time.monotonic(), made wall time by one offset."""

    def __init__(self, tracer: Tracer, parent: Context, method: str) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._tracer = tracer
        self._method = method
        self._error: str | None = None
        self._root = tracer.start_span(
            method, parent, SpanKind.SERVER, start_time=self._wall_ns(time.monotonic())
        )
        self._context = set_span_in_context(self._root, Context())

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, as in `traceparent`."""
        return format_trace_id(self._root.get_span_context().trace_id)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[Span]:
        """A part of the request, around a piece of code. What it raises is named by its class alone."""
        span = self._tracer.start_span(name, self._context, start_time=self._wall_ns(time.monotonic()))
        try:
            yield span
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end(self._wall_ns(time.monotonic()))

    def add_generation(self, choices: Sequence[Choice], head: Head, error: BaseException | None) -> None:
        """What the engine did for the choices, which have ended, by `error` if there is one."""
        if not self._root.is_recording():
            return
        is_failed = isinstance(error, Exception)  # else nobody listens any more
        self._error = type(error).__name__ if is_failed else None
        for choice in choices:
            self._add_choice(choice)
        params, first = choices[0].request.params, choices[0]
        attributes: dict[str, AttributeValue | None] = {
            "gen_ai.request.model": head.model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.response.model": head.model,
            "gen_ai.response.id": head.answer_id,
            "gen_ai.response.finish_reasons": [
                choice.finish_reason or ("error" if is_failed else "abort") for choice in choices
            ],
            "gen_ai.usage.input_tokens": head.usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": head.usage.cached_tokens,
            "gen_ai.usage.output_tokens": head.usage.completion_tokens,
            "gen_ai.usage.num_sequences": len(choices),
        }
        if first.last is not None and first.last.first_token_s:
            arrival_s = first.request.arrival_s
            attributes["gen_ai.latency.time_in_queue"] = first.last.scheduled_s - arrival_s
            attributes["gen_ai.latency.time_to_first_token"] = first.last.first_token_s - arrival_s
        self._root.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def end(self, route: str | None, status: int, request_id: str) -> None:
        """The request is answered. route: the template of its path, None if it is none of ours."""
        root = self._root
        root.set_attribute("http.request.method", self._method)
        root.set_attribute("http.response.status_code", status)
        root.set_attribute("gen_ai.request.id", request_id)
        if route is not None:
            root.update_name(f"{self._method} {route}")
            root.set_attribute("http.route", route)
        if route in OPERATIONS:
            root.set_attribute("gen_ai.operation.name", OPERATIONS[route])
            root.set_attribute("gen_ai.provider.name", "cabochon")
        if self._error is not None:
            root.set_attribute("error.type", self._error)
        elif status >= 500:
            root.set_attribute("error.type", str(status))
        if status >= 500 or (self._error is not None and status == 200):  # a stream that broke
            root.set_status(StatusCode.ERROR)
        root.end(self._wall_ns(time.monotonic()))

    def _add_choice(self, choice: Choice) -> None:
        arrival_s, last = choice.request.arrival_s, choice.last
        if last is None or not last.first_token_s:  # it ended without a token: what it waited for is unknown
            self._add("queue", choice, arrival_s, time.monotonic(), {})
            return
        prompt = {
            "cabochon.prompt_tokens": len(choice.request.prompt_ids),
            "cabochon.cached_tokens": last.cached_tokens,
        }
        output = {"cabochon.output_tokens": choice.num_tokens}
        self._add("queue", choice, arrival_s, last.scheduled_s, {})
        self._add("prefill", choice, last.scheduled_s, last.first_token_s, prompt)
        self._add("decode", choice, last.first_token_s, choice.last_token_s, output)

    def _add(self, name: str, choice: Choice, start_s: float, end_s: float, counts: dict[str, int]) -> None:
        attributes = {"cabochon.choice_idx": choice.index, **counts}
        span = self._tracer.start_span(
            name, self._context, attributes=attributes, start_time=self._wall_ns(start_s)
        )
        span.end(self._wall_ns(max(start_s, end_s)))

    def _wall_ns(self, monotonic_s: float) -> int:
        return round(monotonic_s * 1e9) + self._offset_ns
