"""An orderly end: what counts as one, by hand and with a process that ends."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_process import ServerProcess

from cabochon.server.gateway import drain_checks
from cabochon.server.gateway.drain_checks import Drain, Probe, Request, check_drain, judge_drain
from cabochon.server.gateway.finding import Finding, Result
from cabochon.server.gateway.http_client import parse_url
from cabochon.server.gateway.subject import Subject

SERVED = [Request(at_s, at_s + 0.1, 200) for at_s in (0.0, 3.0, 6.0)]
WARNED = [Probe(0.0, 200), Probe(0.1, 503), Probe(7.0, 503), Probe(8.0, None)]
REFUSED = Request(7.0, 7.1, 503)


def broken(findings: list[Finding]) -> dict[str, Result]:
    return {finding.check: finding.result for finding in findings if finding.result is not Result.PASS}


def judged(**changes: Any) -> dict[str, Result]:
    good: dict[str, Any] = {"probes": WARNED, "requests": [*SERVED, REFUSED], "stream_s": 5.0}
    return broken(judge_drain(Drain(**{**good, **changes})))


def test_an_orderly_end_passes_in_four_checks() -> None:
    findings = judge_drain(Drain(probes=WARNED, requests=[*SERVED, REFUSED], stream_s=5.0))
    assert [(one.check, one.measured) for one in findings] == [
        ("drain.health", "503 after 100 ms"),
        ("drain.stream", "whole after 5.0 s"),
        ("drain.requests", "none refused before the 503"),
        ("drain.lame_duck", "served for 5.9 s after the 503"),
    ]
    assert broken(findings) == {}
    assert findings[0].numbers == {"health_503_ms": 100, "refused_ms": 7000, "stream_whole_ms": 5000}


def test_a_port_that_closes_without_a_503_fails() -> None:
    closed = [Probe(0.0, 200), Probe(0.1, None)]
    unserved = [Request(0.2, 0.2, None)]
    assert judged(probes=closed, requests=unserved) == {
        "drain.health": Result.FAIL,
        "drain.requests": Result.FAIL,
        "drain.lame_duck": Result.WARN,
    }


def test_a_stream_that_breaks_or_lasts_too_long_fails() -> None:
    assert judged(stream_s=None) == {"drain.stream": Result.FAIL}
    assert judged(stream_s=None, stream="ended without [DONE]") == {"drain.stream": Result.FAIL}


def test_refusing_while_health_still_says_200_fails() -> None:
    late = [Probe(0.0, 200), Probe(0.5, 200), Probe(1.0, 503)]
    assert judged(probes=late, requests=[Request(0.1, 0.2, 503)]) == {
        "drain.requests": Result.FAIL,
        "drain.lame_duck": Result.WARN,
    }
    assert "drain.requests" not in judged(probes=late, requests=[Request(0.1, 0.6, 503)])


def test_refusing_at_once_is_a_warning_and_429_is_an_answer() -> None:
    assert judged(requests=[Request(0.2, 0.3, 503)]) == {"drain.lame_duck": Result.WARN}
    assert judged(requests=[Request(6.0, 6.1, 429)]) == {}


@contextmanager
def fake(**server: Any) -> Iterator[tuple[ServerProcess, Subject]]:
    options = {"faults": {"delay_s": 0.02}, "server": {"served_model_name": ["demo"], **server}}
    with ServerProcess(**options) as process:
        target = parse_url(process.url.removesuffix("/v1"))
        yield (
            process,
            Subject(target=target, model="demo", concurrency=1, seconds=1, extra={"ignore_eos": True}),
        )


@pytest.mark.parametrize(
    ("options", "stream_s", "results"),
    [
        ({"lame_duck_s": 1.0}, 1.5, {}),
        ({"lame_duck_s": 0.0}, 1.0, {"drain.lame_duck": Result.WARN}),
        ({"lame_duck_s": 1.0, "drain_timeout_s": 0.0}, 6.0, {"drain.stream": Result.FAIL}),
    ],
)
def test_a_process_that_gets_sigterm(
    options: dict[str, float],
    stream_s: float,
    results: dict[str, Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {"RATE_S": 0.2, "STREAM_S": stream_s, "PROBES_S": 0.5, "REQUEST_INTERVAL_S": 0.1}
    for name, value in times.items():
        monkeypatch.setattr(drain_checks, name, value)
    with fake(**options) as (process, subject):
        assert broken(asyncio.run(check_drain(subject, process.process.pid))) == results
        process.process.wait(10)
