"""The switch: off, nothing of OpenTelemetry is there; on, what was traced is sent before the process ends."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from otlp_collector import Collector

from cabochon.engine.errors import ConfigError
from cabochon.server.config import ServerConfig
from cabochon.server.tracing import start_tracing

TESTS = Path(__file__).parents[1]


def run(code: str) -> str:
    """What a fresh process prints, which has a LiveServer at hand."""
    head = f"import sys; sys.path.append({str(TESTS)!r}); from fake_server import CHAT, LiveServer\n"
    command = [sys.executable, "-c", head + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_off_a_server_at_work_has_loaded_no_sdk_and_no_exporter() -> None:
    """FastAPI itself imports OpenTelemetry's interfaces, which do nothing."""
    loaded = run(
        "with LiveServer() as live: assert live.complete(max_tokens=1).status_code == 200\n"
        "ours = ('opentelemetry.sdk', 'opentelemetry.exporter', 'cabochon.server.spans', 'requests')\n"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    assert loaded == "[]"
    assert start_tracing(None) is None


def test_what_fastapi_would_trace_by_itself_is_off() -> None:
    """It quotes exceptions, and needs no more than that somebody sets the global providers."""
    told = run(
        "from opentelemetry import trace\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "from opentelemetry.sdk.trace.export import SimpleSpanProcessor\n"
        "from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter\n"
        "provider, exporter = TracerProvider(), InMemorySpanExporter()\n"
        "provider.add_span_processor(SimpleSpanProcessor(exporter))\n"
        "trace.set_tracer_provider(provider)\n"
        "with LiveServer() as live:\n"
        "    live.engine.submit = None\n"
        "    assert live.complete(max_tokens=1).status_code == 500\n"
        "print(exporter.get_finished_spans())"
    )
    assert told == "()"


def test_without_its_packages_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cabochon.server.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    with pytest.raises(ConfigError, match=r"\.context is not installed: pip install 'cabochon\[otel\]'"):
        start_tracing("http://127.0.0.1:4318")


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "grpc://collector:4317", "http://"])
def test_an_endpoint_that_is_no_http_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint must be an http:// or https:// URL, got"):
        ServerConfig(otlp_endpoint=endpoint)


def test_a_server_that_is_told_to_end_sends_its_spans_first() -> None:
    with Collector() as collector:
        options = json.dumps({"server": {"otlp_endpoint": collector.url, "ui": False}})
        command = [sys.executable, str(TESTS / "fake_server.py"), options]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            try:
                url = next(line for line in process.stdout if "ready at" in line).split()[-1]
                body = {"prompt": "hello", "max_tokens": 3}
                assert httpx.post(f"{url}/completions", json=body).status_code == 200
                assert not collector.requests  # batches go every five seconds
                started_s = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
                assert time.monotonic() - started_s < 4
            finally:
                process.kill()
        names = {span.name for span in collector.spans()}
    assert names == {"POST /v1/completions", "queue", "prefill", "decode"}
