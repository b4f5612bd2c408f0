"""The report as a whole: options, order, what cannot be reached, table, JSON, exit code."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broken_server import BrokenServer, Fault, status, text

from cabochon.engine.errors import ConfigError
from cabochon.server import cli, gateway_check
from cabochon.server.gateway import load_checks
from cabochon.server.gateway.finding import Finding, Result
from cabochon.server.gateway.subject import HEALTH, METRICS, MODELS
from cabochon.server.gateway_check import Options, Report, as_json, as_table, check_servers, read_options

TIMES = {"load.latency", "load.fresh"}  # of a busy machine, too
ABSENT = ("metrics.lora", "lora.active", "lora.routes")
QUICK = ("--seconds=1", "--concurrency=2")


@pytest.fixture(scope="module")
def server() -> Iterator[BrokenServer]:
    with BrokenServer(served_model_name=("demo",)) as one:
        yield one


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Server and client share the interpreter, on a machine that may be busy."""
    monkeypatch.setattr(load_checks, "FREED_S", 2.0)


def reports_of(*args: str) -> list[Report]:
    return asyncio.run(check_servers(read_options([*args, *QUICK]), lambda _line: None))


def not_passed(report: Report) -> dict[str, Result]:
    """But for times, which a busy machine spoils."""
    rows = [row for row in report.findings if row.result is not Result.PASS and row.check not in TIMES]
    return {row.check: row.result for row in rows}


def test_a_good_server_passes_every_check(server: BrokenServer) -> None:
    (report,) = reports_of(server.url)
    assert not_passed(report) == dict.fromkeys(ABSENT, Result.SKIP)
    assert (report.url, report.model, len(report.findings)) == (server.url, "demo", 28)
    checks = [row.check for row in report.findings]
    assert len(set(checks)) == len(checks)


def test_every_check_is_in_the_guide(server: BrokenServer) -> None:
    guide = (Path(__file__).parents[2] / "docs/gateway.md").read_text()
    (report,) = reports_of(server.url)
    ends = ("drain.health", "drain.stream", "drain.requests", "drain.lame_duck", "pool.models")
    missing = [name for name in (*(row.check for row in report.findings), *ends) if f"`{name}`" not in guide]
    assert missing == []


@pytest.mark.parametrize(
    ("fault", "results"),
    [
        (Fault(path=HEALTH, change=status(503)), {"health.ready", "load.health"}),
        (
            Fault(path=METRICS, change=status(500)),
            {"metrics.answer", "load.running", "load.kv", "client.reached"},
        ),
    ],
)
def test_a_group_that_cannot_be_finished_is_a_failure_and_the_others_go_on(
    fault: Fault, results: set[str], server: BrokenServer
) -> None:
    with server.broken(fault):
        (report,) = reports_of(server.url)
    assert set(not_passed(report)) - {"lora.active", "lora.routes", "metrics.lora"} == results
    assert report.findings[-1].check == "lora.routes"


def test_without_a_model_only_health_and_metrics_are_checked(server: BrokenServer) -> None:
    with server.broken(Fault(path=MODELS, change=text(b'"data"', b'"models"'))):
        (report,) = reports_of(server.url)
    assert not_passed(report) == {"metrics.lora": Result.SKIP, "model.listed": Result.FAIL}
    assert report.model is None


def test_nobody_at_the_port_and_a_silent_server_are_failures(
    server: BrokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_check, "GROUP_S", 0.1)
    (report,) = reports_of("http://127.0.0.1:9")
    assert [row.check for row in report.findings] == ["health.reached", "metrics.reached", "model.reached"]
    assert "no connection to http://127.0.0.1:9" in report.findings[0].measured
    with server.broken(Fault(path=MODELS, delay_s=0.5)):
        (report,) = reports_of(server.url)
    assert report.findings[-1].measured == "no end within 0.1 s"


def test_the_time_of_all_checks_is_bounded(server: BrokenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_check, "BUDGET_S", -1.0)  # with one second of load
    (report,) = reports_of(server.url)
    assert {row.measured for row in report.findings} == {"no end within 0 s"}


def test_a_named_model_is_asked_and_a_key_is_sent(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    with BrokenServer(served_model_name=("demo", "other"), api_key_file=str(key)) as server:
        (report,) = reports_of(server.url, "--model=other", f"--api-key-file={key}")
        assert not_passed(report) == dict.fromkeys(ABSENT, Result.SKIP)
        assert report.model == "other"
        (refused,) = reports_of(server.url)
    assert not_passed(refused)["model.listed"] is Result.FAIL
    assert "secret" not in as_json([report]) + as_table(report)


def test_servers_of_a_pool_must_serve_the_same_models(server: BrokenServer) -> None:
    with BrokenServer(served_model_name=("demo", "more")) as other:
        same, last = reports_of(server.url, other.url)
    assert not_passed(same) == dict.fromkeys(ABSENT, Result.SKIP)
    assert last.findings[-1].check == "pool.models"
    assert (last.findings[-1].result, last.findings[-1].measured) == (Result.FAIL, "more is not everywhere")


def test_a_pool_without_any_models_fails() -> None:
    *_, last = reports_of("http://127.0.0.1:9", "http://127.0.0.1:9")
    assert (last.findings[-1].check, last.findings[-1].result) == ("pool.models", Result.FAIL)
    assert last.findings[-1].measured == "0 on each"


def test_the_table_has_a_row_for_each_finding_and_advice_where_it_is_needed() -> None:
    report = Report("http://a:1", "demo", 2.5)
    report.findings = [
        Finding(check="x.long", result=Result.PASS, measured="1 ms", limit="5 ms"),
        Finding(check="y", result=Result.FAIL, measured="none", limit="one", advice="write one"),
    ]
    assert as_table(report).splitlines() == [
        "http://a:1  model demo  2.5 s",
        "check   result  measured  limit",
        "x.long  pass    1 ms      5 ms",
        "y       FAIL    none      one",
        "    → write one",
        "1 passed, 1 failed",
    ]
    content = json.loads(as_json([report]))
    assert content["failed"] == 1
    assert content["servers"][0]["findings"][1] == {
        "check": "y",
        "result": "fail",
        "measured": "none",
        "limit": "one",
        "advice": "write one",
        "numbers": {},
    }


def test_what_a_server_says_cannot_draw_on_the_terminal() -> None:
    report = Report("http://a:1", "de\x1b[2Jmo\n", 1.0)
    report.findings = [Finding(check="x", result=Result.WARN, measured="\r" + "a" * 200, limit="y")]
    head, _, row, _ = as_table(report).splitlines()
    assert head == "http://a:1  model de?[2Jmo?  1 s"
    assert row == f"x      warn    ?{'a' * 98}…  y"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["http://a", "--concurrency=0"], r"concurrency must be in \[1, 512\], got 0: change it"),
        (["http://a", "--seconds=0.5"], r"seconds must be in \[1, 600\], got 0.5: change it"),
        (["http://a", "http://b", "--drain-pid=1"], "drain_pid must belong to one URL, got 2"),
        (["http://a", "--drain-pid=0"], "drain_pid must be a process that may be ended, 0 is none"),
        (["http://a", "--drain-pid=-1"], "drain_pid must be a process that may be ended, -1 is none"),
        (["http://a", "--drain-pid=4194305"], "drain_pid must be a process that may be ended, 4194305"),
        (["http://a", "--api-key-file=/nonexistent"], "api_key_file must be a file with a key"),
        (["http://a", "--api-key-file=/dev/null"], "api_key_file must have a key, /dev/null has none"),
    ],
)
def test_bad_options_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(args)


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> object:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["cabochon", "gateway-check", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize(("result", "code"), [(Result.WARN, 0), (Result.SKIP, 0), (Result.FAIL, 1)])
def test_only_a_failure_makes_the_exit_code_1(
    result: Result, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def check_servers(options: Options, tell: Callable[[str], None]) -> list[Report]:
        tell(f"checking {options.targets[0].url}")
        report = Report(options.targets[0].url, "demo", 1.0)
        report.findings = [Finding(check="x", result=result, measured="none", limit="one")]
        return [report]

    monkeypatch.setattr(cli, "check_servers", check_servers)
    assert run(monkeypatch, "http://a:1") == code
    table = capsys.readouterr()
    assert table.out.startswith("http://a:1  model demo  1 s\ncheck  result")
    assert table.err == "checking http://a:1\n"
    assert run(monkeypatch, "http://a:1", "--json") == code
    assert json.loads(capsys.readouterr().out)["failed"] == code


def test_what_will_be_checked_is_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_check, "BUDGET_S", -1.0)
    told: list[str] = []
    asyncio.run(check_servers(read_options(["http://a:1", "http://b:2", "--seconds=3"]), told.append))
    assert told == ["checking http://a:1, at most 2 s", "checking http://b:2, at most 2 s"]


def test_wrong_usage_is_2_and_help_has_the_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 2
    assert run(monkeypatch, "localhost:8000") == 2
    assert "cabochon: a URL must be http://HOST:PORT" in capsys.readouterr().err
    assert run(monkeypatch, "--help") == 0
    assert "--drain-pid" in capsys.readouterr().out
