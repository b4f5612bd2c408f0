"""Adapters over a real connection, each rule broken once."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from broken_server import BrokenServer, Fault, status, text
from fake_server import COMPLETIONS

from cabochon.engine.fake import FAKE_INFO, FakeEngine
from cabochon.engine.messages import AdapterInfo
from cabochon.server.gateway import lora_checks
from cabochon.server.gateway.finding import Finding, Result
from cabochon.server.gateway.http_client import parse_url
from cabochon.server.gateway.lora_checks import LOAD, UNLOAD, check_lora
from cabochon.server.gateway.subject import METRICS, MODELS, Subject

RED = AdapterInfo(name="red", path="red", rank=8, num_bytes=1, base_model=None)


def engine_with_red() -> FakeEngine:
    engine = FakeEngine(replace(FAKE_INFO, max_loras=2, adapters=[RED]))
    engine.snapshot = replace(engine.snapshot, resident_adapters=["red"])
    return engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokenServer]:
    folder = tmp_path_factory.mktemp("adapters")
    with BrokenServer(engine=engine_with_red(), lora_dir=folder, served_model_name=("demo",)) as one:
        yield one


def checked(server: BrokenServer) -> list[Finding]:
    subject = Subject(target=parse_url(server.url), model="demo", concurrency=1, seconds=1)
    return asyncio.run(check_lora(subject))


def results(findings: list[Finding]) -> dict[str, Result]:
    return {finding.check: finding.result for finding in findings}


def test_a_good_server_passes_and_nothing_is_loaded(server: BrokenServer) -> None:
    assert results(checked(server)) == {"lora.active": Result.PASS, "lora.routes": Result.PASS}
    assert list(server.engine.adapters) == ["red"]


def test_a_server_without_adapters_is_skipped() -> None:
    with BrokenServer() as server:
        assert results(checked(server)) == {"lora.active": Result.SKIP, "lora.routes": Result.SKIP}


@pytest.mark.parametrize(
    ("fault", "check", "measured"),
    [
        (Fault(path=METRICS, change=text(b'"red"', b'""')), "lora.active", "red is not in the gauge"),
        (Fault(path=COMPLETIONS, change=status(404)), "lora.active", "red answered 404"),
        (Fault(path=LOAD, change=status(200)), "lora.routes", "an empty body got 200 and 400"),
        (Fault(path=UNLOAD, change=status(404)), "lora.routes", "an empty body got 400 and 404"),
        (Fault(path=UNLOAD, change=status(500)), "lora.routes", "an empty body got 400 and 500"),
    ],
)
def test_each_rule_can_fail(
    fault: Fault, check: str, measured: str, server: BrokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_checks, "SEEN_S", 0.2)
    with server.broken(fault):
        findings = checked(server)
    assert [(one.check, one.measured) for one in findings if one.result is Result.FAIL] == [(check, measured)]


def test_models_without_a_parent_are_no_adapters(server: BrokenServer) -> None:
    with server.broken(Fault(path=MODELS, change=text(b'"parent":"demo"', b'"parent":null'))):
        assert results(checked(server))["lora.active"] is Result.SKIP
