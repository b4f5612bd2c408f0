"""Load over a real connection, each rule broken once; times by hand."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from broken_server import BrokenServer, Change, Fault, lost, status, text
from fake_server import COMPLETIONS

from cabochon.server.gateway import load_checks
from cabochon.server.gateway.endpoint_metrics import EndpointMetrics
from cabochon.server.gateway.finding import Finding, Result
from cabochon.server.gateway.http_client import parse_url
from cabochon.server.gateway.load_checks import Load, check_disconnect, check_load, judge_load
from cabochon.server.gateway.subject import HEALTH, METRICS, Subject

TIMES = {"load.latency", "load.fresh"}  # of a busy machine, too
BUSY = EndpointMetrics(running=2, kv_usage=0.5, updated_s=1.0)
GOOD = Load(scrapes_s=[0.002] * 100, metrics=[BUSY], probes=[200, 200], num_answers=2)


@pytest.fixture(scope="module")
def server() -> Iterator[BrokenServer]:
    with BrokenServer(served_model_name=("demo",)) as one:
        yield one


@pytest.fixture
def subject(server: BrokenServer) -> Subject:
    extra = {"ignore_eos": True}
    return Subject(target=parse_url(server.url), model="demo", concurrency=2, seconds=1.0, extra=extra)


def idle(gauge: bytes) -> Change:
    """It reads 0."""
    return text(rb"(%s\{.*\}) .*" % gauge, rb"\1 0")


def broken(findings: list[Finding]) -> dict[str, Result]:
    return {finding.check: finding.result for finding in findings if finding.result is not Result.PASS}


def test_good_numbers_pass() -> None:
    findings = judge_load(GOOD, 2)
    assert broken(findings) == {}
    assert [finding.check for finding in findings] == [
        "load.latency",
        "load.fresh",
        "load.running",
        "load.kv",
        "load.health",
        "load.answers",
    ]
    assert findings[0].measured == "p50 2.0 ms, p99 2.0 ms of 100"
    assert findings[0].numbers == {"p50_ms": 2.0, "p99_ms": 2.0, "max_ms": 2.0}
    assert findings[1].measured == "values at most 52 ms old"


@pytest.mark.parametrize(
    ("scrapes_s", "results"),
    [
        ([0.05] * 100, {}),
        ([0.002] * 98 + [0.051] * 2, {"load.latency": Result.WARN}),
        ([0.002] * 99 + [0.16], {"load.fresh": Result.WARN}),
        ([0.002] * 98 + [0.16] * 2, {"load.latency": Result.FAIL, "load.fresh": Result.WARN}),
        ([], {"load.latency": Result.FAIL}),
    ],
)
def test_late_scrapes_warn_and_stale_values_fail(scrapes_s: list[float], results: dict[str, Result]) -> None:
    assert broken(judge_load(replace(GOOD, scrapes_s=scrapes_s), 2)) == results


@pytest.mark.parametrize(
    ("change", "check", "result"),
    [
        ({"failures": ["/metrics answered 500"]}, "load.latency", Result.FAIL),
        ({"metrics": [replace(BUSY, running=0)]}, "load.running", Result.FAIL),
        ({"metrics": [replace(BUSY, kv_usage=0.0)]}, "load.kv", Result.WARN),
        ({"probes": [200, None]}, "load.health", Result.FAIL),
        ({"probes": []}, "load.health", Result.FAIL),
        ({"broken": ["a stream got 503"]}, "load.answers", Result.FAIL),
        ({"num_answers": 0}, "load.answers", Result.FAIL),
    ],
)
def test_each_rule_can_fail(change: dict[str, object], check: str, result: Result) -> None:
    assert broken(judge_load(replace(GOOD, **change), 2)) == {check: result}


def load_of(subject: Subject) -> dict[str, Result]:
    results = broken(asyncio.run(check_load(subject)))
    return {check: result for check, result in results.items() if check not in TIMES}


def test_a_good_server_passes(
    server: BrokenServer, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_checks, "FREED_S", 2.0)  # server and client share the interpreter
    assert load_of(subject) == {}
    assert broken(asyncio.run(check_disconnect(subject))) == {}


@pytest.mark.parametrize(
    ("fault", "results"),
    [
        (Fault(path=HEALTH, change=status(503)), {"load.health": Result.FAIL}),
        (Fault(path=COMPLETIONS, change=status(503)), {"load.answers": Result.FAIL}),
        (Fault(path=COMPLETIONS, change=status(429)), {}),
        (
            Fault(path=METRICS, change=text(rb"(requests_running\{.*\}) .*", rb"\1 0")),
            {"load.running": Result.FAIL},
        ),
        (
            Fault(path=METRICS, change=text(rb"(kv_cache_usage_perc\{.*\}) .*", rb"\1 0")),
            {"load.kv": Result.WARN},
        ),
    ],
)
def test_what_is_wrong_on_the_wire_is_found(
    fault: Fault, results: dict[str, Result], server: BrokenServer, subject: Subject
) -> None:
    with server.broken(fault):
        assert load_of(subject) == results


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_streams_that_break_off_are_found(server: BrokenServer, subject: Subject) -> None:
    short = replace(subject, long_tokens=4)
    with server.broken(Fault(path=COMPLETIONS, change=lost)):
        findings = {finding.check: finding for finding in asyncio.run(check_load(short))}
    assert findings["load.answers"].result is Result.FAIL
    assert "before its answer was whole" in findings["load.answers"].measured


@pytest.mark.parametrize(
    ("fault", "measured"),
    [
        (Fault(path=METRICS, change=status(500)), "failed: /metrics answered 500"),
        (Fault(path=METRICS, change=text(b"# TYPE", b"## TYPE\xff")), "failed: /metrics is not UTF-8"),
        (Fault(path=METRICS, delay_s=0.3), "failed: no answer in 0.1 s"),
    ],
)
def test_scrapes_that_fail_are_found(
    fault: Fault,
    measured: str,
    server: BrokenServer,
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault.delay_s:
        monkeypatch.setattr(load_checks, "SCRAPE_TIMEOUT_S", 0.1)
    with server.broken(fault):
        latency = asyncio.run(check_load(subject))[0]
    assert latency.result is Result.FAIL
    assert measured in latency.measured


def test_a_slow_metrics_route_is_timed(server: BrokenServer, subject: Subject) -> None:
    with server.broken(Fault(path=METRICS, delay_s=0.06)):
        latency = asyncio.run(check_load(subject))[0]
    assert latency.result is not Result.PASS
    assert latency.numbers["p50_ms"] > 60


def test_a_server_that_does_not_notice_a_lost_client_fails(
    server: BrokenServer, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_checks, "WAIT_S", 0.8)
    with server.broken(Fault(path=COMPLETIONS, is_deaf=True)):
        (finding,) = asyncio.run(check_disconnect(subject))
        assert finding.result is Result.FAIL
        assert finding.measured == "slot free not within 0.8 s"
        (busy,) = asyncio.run(check_disconnect(subject))
    assert (busy.result, busy.measured) == (Result.SKIP, "others use the server")
    for request_id in list(server.engine.open):
        server.engine.abort(request_id)


def test_an_answer_that_is_over_at_once_shows_nothing(server: BrokenServer, subject: Subject) -> None:
    (finding,) = asyncio.run(check_disconnect(replace(subject, model="nobody")))
    assert (finding.result, finding.measured) == (Result.SKIP, "the stream (status 404) was not seen")
