"""Spans of requests: their times, names and attributes, and that no content is in them."""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise

import pytest
from fake_server import CHAT, COMPLETIONS, LiveServer, wait_until
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, get_tracer_provider
from otlp_collector import Collector

from cabochon.engine.errors import EngineDead
from cabochon.server import spans as spans_module
from cabochon.server.spans import Tracing

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "xylophone"


class Traced:
    """A live server whose spans are kept."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.live = LiveServer(tracing=Tracing(SimpleSpanProcessor(self.exporter)))

    def spans(self) -> dict[str, ReadableSpan]:
        """By name, of the only request, when it has ended."""
        wait_until(lambda: any(span.kind is SpanKind.SERVER for span in self.exporter.get_finished_spans()))
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def root(self) -> ReadableSpan:
        return next(span for span in self.spans().values() if span.kind is SpanKind.SERVER)


@pytest.fixture
def traced() -> Iterator[Traced]:
    traced = Traced()
    with traced.live:
        yield traced


def attributes(span: ReadableSpan) -> Mapping[str, object]:
    return dict(span.attributes or {})


def test_a_request_is_a_server_span_with_queue_prefill_and_decode_in_a_row(traced: Traced) -> None:
    before_ns = time.time_ns()
    traced.live.faults.delay_s = 0.02
    traced.live.faults.cached_tokens = 2
    answer = traced.live.complete([300, 301, 302], max_tokens=3, temperature=0.5).json()
    spans = traced.spans()
    root = spans[f"POST {COMPLETIONS}"]
    assert root.parent is None
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == root.context.span_id
        assert part.context.trace_id == root.context.trace_id
    ends = [
        before_ns,
        root.start_time,
        *(time for part in parts for time in (part.start_time, part.end_time)),
    ]
    assert ends == sorted(ends)
    assert parts[-1].end_time <= root.end_time <= time.time_ns()
    assert all(a.end_time == b.start_time for a, b in pairwise(parts))
    assert parts[1].end_time - parts[1].start_time >= 0.02e9  # one step
    assert parts[2].end_time - parts[2].start_time >= 0.04e9  # two
    told = attributes(root)
    assert 0.02 <= told.pop("gen_ai.latency.time_to_first_token") < 5
    assert 0 <= told.pop("gen_ai.latency.time_in_queue") < 5
    assert len(str(told.pop("gen_ai.request.id"))) == 32
    assert told == {
        "http.request.method": "POST",
        "http.route": COMPLETIONS,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "cabochon",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.model": "fake",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.num_sequences": 1,
    }
    assert attributes(spans["prefill"])["cabochon.prompt_tokens"] == 3
    assert attributes(spans["decode"]) == {"cabochon.choice_idx": 0, "cabochon.output_tokens": 3}


def test_a_traceparent_is_the_parent_and_its_trace_id_is_in_the_log(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cabochon")
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
    traced.live.http.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 1}, headers=headers)
    root = traced.root()
    assert format(root.context.trace_id, "032x") == TRACE_ID
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == PARENT_ID
    assert root.context.trace_state.get("vendor") == "1"
    wait_until(lambda: f" trace_id={TRACE_ID} " in caplog.text)  # written when the span has ended


@pytest.mark.parametrize(
    "header", ["garbage", f"00-{'0' * 32}-{PARENT_ID}-01", f"ff-{TRACE_ID}-{PARENT_ID}-01"]
)
def test_a_malformed_traceparent_begins_a_new_trace(traced: Traced, header: str) -> None:
    traced.live.http.get("/v1/models", headers={"traceparent": header})
    assert traced.root().parent is None
    assert format(traced.root().context.trace_id, "032x") != TRACE_ID


def test_what_the_parent_does_not_sample_is_not_sent(traced: Traced) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    answer = traced.live.http.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 1}, headers=headers)
    assert answer.status_code == 200
    traced.live.http.get("/v1/models")
    assert traced.root().name == "GET /v1/models"
    assert len(traced.spans()) == 1


def test_each_choice_has_its_parts(traced: Traced) -> None:
    traced.live.complete("hello", n=3, max_tokens=2)
    root = traced.root()
    assert attributes(root)["gen_ai.usage.num_sequences"] == 3
    assert attributes(root)["gen_ai.response.finish_reasons"] == ("length",) * 3
    decodes = [span for span in traced.exporter.get_finished_spans() if span.name == "decode"]
    assert [attributes(span)["cabochon.choice_idx"] for span in decodes] == [0, 1, 2]


def test_probes_and_scrapes_have_no_spans(traced: Traced) -> None:
    for path in ("/health", "/metrics", "/-/healthz", "/version"):
        traced.live.http.get(path)
    assert traced.root().name == "GET /version"
    assert len(traced.spans()) == 1


def test_no_content_is_in_a_span_whatever_happens(traced: Traced) -> None:
    live = traced.live
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
    live.post(CHAT, body)
    live.post(CHAT, {**body, "stream": True})
    live.post(CHAT, {**body, "temperature": SECRET})
    live.post(CHAT, {**body, "model": SECRET})
    live.post(f"/{SECRET}?q={SECRET}", body, headers={"x-request-id": f"{SECRET}!"})
    live.faults.refuses = RuntimeError(SECRET)  # type: ignore[assignment]  # a bug
    live.post(CHAT, body)
    live.faults.refuses = None
    live.faults.fails_after_tokens = {2: RuntimeError(SECRET)}  # type: ignore[dict-item]
    live.post(CHAT, {**body, "stream": True})
    wait_until(lambda: len([s for s in traced.exporter.get_finished_spans() if s.parent is None]) == 7)
    finished = traced.exporter.get_finished_spans()
    assert not any(SECRET in span.to_json() or span.events for span in finished)
    roots = sorted((span for span in finished if span.parent is None), key=lambda span: span.start_time or 0)
    told = [attributes(root) for root in roots]
    assert [one["http.response.status_code"] for one in told] == [200, 200, 400, 404, 404, 500, 200]
    assert [one.get("error.type") for one in told] == [None] * 5 + ["RuntimeError"] * 2
    assert [root.status.is_ok for root in roots] == [True] * 5 + [False] * 2


def test_a_client_that_goes_away_ends_its_spans_as_aborted(traced: Traced) -> None:
    traced.live.faults.delay_s = 0.01
    with traced.live.stream(COMPLETIONS, {"prompt": "hello", "max_tokens": 500}) as answer:
        next(answer.iter_bytes())
    told = attributes(traced.root())
    assert told["gen_ai.response.finish_reasons"] == ("abort",)
    assert "error.type" not in told
    assert traced.root().status.is_ok


def test_a_stop_string_is_a_finish_reason(traced: Traced) -> None:
    traced.live.complete("hello", stop="hell", max_tokens=9)
    assert attributes(traced.root())["gen_ai.response.finish_reasons"] == ("stop",)


def test_a_request_that_never_ran_has_only_waited(traced: Traced) -> None:
    traced.live.faults.refuses = EngineDead("the engine ended: restart")
    assert traced.live.complete().status_code == 503
    spans = traced.spans()
    assert set(spans) == {f"POST {COMPLETIONS}", "queue"}
    assert attributes(traced.root())["error.type"] == "EngineDead"


def test_a_part_of_a_request_names_an_error_by_its_class_alone() -> None:
    exporter = InMemorySpanExporter()
    trace = Tracing(SimpleSpanProcessor(exporter)).begin("POST", {})
    with trace.span("armor") as span:
        span.set_attribute("cabochon.verdict", "pass")
    with pytest.raises(ValueError, match=SECRET), trace.span("armor"):
        raise ValueError(SECRET)
    trace.end(None, 200, "id")
    fine, failed, root = exporter.get_finished_spans()
    assert attributes(fine) == {"cabochon.verdict": "pass"}
    assert attributes(failed) == {"error.type": "ValueError"}
    assert not failed.status.is_ok
    assert not failed.events
    assert fine.parent == failed.parent == root.context
    assert root.name == "POST"


def test_the_global_provider_is_left_alone() -> None:
    Tracing(SimpleSpanProcessor(InMemorySpanExporter())).begin("GET", {})
    assert type(get_tracer_provider()).__name__ == "ProxyTracerProvider"


@pytest.mark.parametrize(("path", "asked"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/in", "/in")])
def test_a_collector_gets_spans_by_otlp(path: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with Collector() as collector:
        tracing = Tracing.to(collector.url + path)
        with LiveServer(tracing=tracing) as live:
            live.chat("hello", max_tokens=2)
        asyncio.run(tracing.close())
        assert [(path, headers.get("x-tenant")) for path, headers, _ in collector.requests] == [
            (asked, "blue")
        ]
        spans = {span.name: span for span in collector.spans()}
        resource = {
            one.key: one.value.string_value
            for one in collector.bodies()[0].resource_spans[0].resource.attributes
        }
    assert set(spans) == {f"POST {CHAT}", "queue", "prefill", "decode"}
    root = spans[f"POST {CHAT}"]
    assert all(spans[name].parent_span_id == root.span_id for name in ("queue", "prefill", "decode"))
    told = {one.key: one.value for one in root.attributes}
    assert told["gen_ai.usage.output_tokens"].int_value == 2
    assert told["gen_ai.operation.name"].string_value == "chat"
    assert abs(root.start_time_unix_nano - time.time_ns()) < 60e9
    assert resource["service.name"] == "cabochon"
    assert resource["deployment.environment"] == "test"


def test_a_service_name_of_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gemma")
    exporter = InMemorySpanExporter()
    trace = Tracing(SimpleSpanProcessor(exporter)).begin("GET", {})
    trace.end(None, 200, "id")
    assert exporter.get_finished_spans()[0].resource.attributes["service.name"] == "gemma"


def test_a_slow_collector_holds_up_neither_requests_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spans_module, "FLUSH_TIMEOUT_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")  # every span is sent at once
    with Collector(delay_s=2) as collector:
        tracing = Tracing.to(collector.url)
        with LiveServer(tracing=tracing) as live:
            live.complete(max_tokens=1)
            wait_until(lambda: collector.requests)
            started_s = time.monotonic()
            for _ in range(5):
                live.complete(max_tokens=1)
            assert time.monotonic() - started_s < 1
        started_s = time.monotonic()
        asyncio.run(tracing.close())
        assert time.monotonic() - started_s < 1
    assert "traces lost, the collector took longer than 0.2 s" in caplog.text
