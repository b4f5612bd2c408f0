"""The load generator against a server whose times and texts are known."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from fake_server import LiveServer
from load.client import Client, Record
from load.workloads import COMPLETIONS

from cabochon.engine.errors import ComputeError, Overloaded
from cabochon.server.gateway.http_client import parse_url

Rows = list[dict[str, Any]]
Load = Callable[..., Rows]


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with LiveServer() as live:
        live.faults.delay_s = 0.01
        yield live


@pytest.fixture
def load(server: LiveServer, tmp_path: Path) -> Load:
    """Runs the program's own main part; returns the rows that it wrote."""

    def run(*options: object) -> Rows:
        out = tmp_path / "rows.jsonl"
        size = "--top-id 200 --prompt-tokens 12 --output-tokens 4 --rounds 1 --warmup-s 0.2 --duration-s 0.6"
        given = [server.url, *size.split(), "--out", out, *options]
        asyncio.run(serving.start(serving.parse_args(list(map(str, given)))))
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_an_open_loop_measures_what_the_server_did(server: LiveServer, load: Load) -> None:
    one, summary = load("--rate", 40, "--slo", "ttft=5s", "--price-per-hour", 2)
    sent = [request for request in server.engine.seen if len(request.prompt_ids) == 12]
    assert 0 < one["requests"] < len(sent), "the warm-up is sent and not counted"
    assert (one["completed"], one["errors"], one["slo_met"]) == (one["requests"], {}, 1)
    assert (one["prompt_tokens_mean"], one["output_tokens_mean"]) == (12, 4)
    assert one["ttft_p50_ms"] >= one["ttft_from_send_p50_ms"] >= 10  # a step takes 10 ms
    assert one["e2e_p50_ms"] >= 40
    assert one["goodput_req_per_s"] == one["offered_req_per_s"]
    assert one["usd_per_million_output_tokens"] > 0
    assert "queue_mean_ms" in one, "from two scrapes of /metrics"
    assert one["client_cpu_share"] > 0
    assert {"commit", "cpu", "cores", "command"} <= one.keys()
    assert summary["spread"]["ttft_p50_ms"] == [one["ttft_p50_ms"]] * 2


def test_a_bounded_open_loop_counts_the_wait_for_a_slot(server: LiveServer, load: Load) -> None:
    server.faults.delay_s = 0.05
    one, _ = load("--rate", 30, "--output-tokens", 1, "--max-in-flight", 1)
    assert one["ttft_from_send_p50_ms"] < one["ttft_p50_ms"] / 3


def test_a_closed_loop_keeps_its_concurrency(server: LiveServer, load: Load) -> None:
    one, _ = load("--arrivals", "closed", "--concurrency", 3)
    assert (one["concurrency"], one["failed"]) == (3, 0)
    assert "rate" not in one
    assert one["completed_req_per_s"] <= 3 / 0.04


def test_a_ramp_ends_where_the_server_falls_behind(server: LiveServer, load: Load) -> None:
    rows = load("--arrivals", "ramp", "--rate", 5, "--factor", 20, "--max-stages", 3, "--max-in-flight", 2)
    rounds = [row for row in rows if "round" in row]
    assert [(row["rate"], row["saturated"]) for row in rounds] == [(5, False), (100, True)]
    assert [row["rate"] for row in rows if "summary" in row] == [5, 100]


def test_head_of_line_sends_the_same_short_requests_without_and_with_long_ones(
    server: LiveServer, load: Load
) -> None:
    options = ("--workload", "head-of-line", "--rate", 20, "--long-tokens", 100, "--long-every-s", 0.3)
    rows = load(*options)
    prompts = [tuple(request.prompt_ids) for request in server.engine.seen]
    short = [prompt for prompt in prompts if len(prompt) == 12]
    assert short[: len(short) // 2] == short[len(short) // 2 :]
    assert sum(len(prompt) == 100 for prompt in prompts) == 3
    assert rows[1]["by_kind"].keys() == {"short", "long"}
    ratio = rows[1]["by_kind"]["short"]["ttft_p99_ms"] / rows[0]["ttft_p99_ms"]
    assert rows[-1]["ratio"] == pytest.approx(ratio, abs=0.001)


@pytest.mark.parametrize("workload", ["sharegpt", "chat", "schema"])
def test_every_workload_is_answered(workload: str, load: Load) -> None:
    options = ("--workload", workload, "--rate", 10, "--scale", 0.05, "--prefix-tokens", 20, "--prefixes", 2)
    one, _ = load(*options)
    assert one["completed"] == one["requests"] > 0


def test_a_trace_is_replayed(server: LiveServer, load: Load, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lengths = [(9, 2), (30, 3), (14, 5)]
    rows = [
        {"timestamp": 250 + 100 * n, "input_length": into, "output_length": out}
        for n, (into, out) in enumerate(lengths)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    one, _, timeline = load("--arrivals", "trace", "--trace", trace, "--timeline")
    assert [(len(request.prompt_ids), request.params.max_tokens) for request in server.engine.seen] == lengths
    assert one["requests"] == 3
    assert [due for due, *_ in timeline["timeline"]] == pytest.approx([0.05, 0.15, 0.25])


def ask(server: LiveServer, timeout_s: float = 10.0, **fields: object) -> Record:
    async def one() -> Record:
        client = Client(parse_url(server.url), timeout_s)
        record = Record("all", 0.0)
        body = {"model": "fake", "prompt": "hello", "max_tokens": 5, "stream": True, **fields}
        await client.stream(COMPLETIONS, json.dumps(body).encode(), record)
        client.close()
        return record

    return asyncio.run(one())


def test_every_kind_of_failure_has_its_name(server: LiveServer) -> None:
    assert ask(server).error is None
    assert ask(server, max_tokens="many").error == "http 400"
    server.faults.refuses = Overloaded("the queue is full: try later", retry_after_s=1)
    assert ask(server).error == "http 429"
    server.faults.refuses = None
    server.faults.fails_after_tokens = {2: ComputeError("NaN")}
    assert ask(server).error == "error event"
    server.faults.fails_after_tokens = {}
    server.faults.is_paused = True
    assert ask(server, timeout_s=0.05).error == "timeout"


def test_a_server_that_is_not_there_is_a_failure_too() -> None:
    record = Record("all", 0.0)
    asyncio.run(Client(parse_url("http://127.0.0.1:9"), 5.0).stream(COMPLETIONS, b"{}", record))
    assert record.error == "no connection"


def test_options_that_cannot_work_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--arrivals", "trace"], ["--workload", "head-of-line", "--arrivals", "closed"]):
        with pytest.raises(SystemExit):
            serving.parse_args(["http://127.0.0.1:1", *options])
    assert "needs --trace FILE" in capsys.readouterr().err
