"""The benchmark of Model Armor on a tiny model: a real server, the real emulator, every case."""

import asyncio
import json
from pathlib import Path

import armor
import pytest

from cabochon.server.gateway.http_client import Target

TINY = "--pairs 3 --warm-up 1 --prompt-words 8 --short-words 8 --streams 2 --output-tokens 24 --rounds 1"
TINY += " --check-times 0.05 0.2 --delay-tokens 24 --repeats 1 --check-s 0.2"
SERVE = "--serve --dtype fp32 --threads 1 --kv-cache-gib 0.01"


@pytest.mark.slow
def test_every_case_is_measured_with_the_guard_at_work(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    armor.main(
        [*armor.PARTS, "--model", str(tiny_gemma2_dir), *TINY.split(), "--out", str(out), *SERVE.split()]
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    of = {case: [row for row in rows if row["case"] == case] for case in ("ttft", "throughput", "delay")}
    assert len(rows) == sum(map(len, of.values()))
    *pairs, ttft = of["ttft"]
    assert len(pairs) == 3
    assert all(pair["prompt_ms"] >= 200 for pair in pairs), "the answer waited for its check"
    assert ttft["added_ms"] > 100, "a tiny prefill hides little of it"
    assert ttft["waited_for_verdict_mean_ms"] > 100
    *_, rates = of["throughput"]
    assert min(rates["window"], rates["off"], rates["unguarded"]) > 0
    assert rates["answer_checks_per_stream"] >= 1
    first = {(row["arm"], row["check_ms"]): row["first_text_ms"] for row in of["delay"]}
    assert len(first) == 6
    for arm in ("window", "strict"):
        assert first[arm, 200] >= 200
        assert first[arm, 50] >= 50
    assert all((row["answer_checks"] > 0) == (row["arm"] != "unguarded") for row in of["delay"])
    assert {"commit", "cpu", "cores", "command"} <= rows[0].keys()


def test_each_arm_begins_a_round() -> None:
    arms = ("a", "b", "c")
    assert [list(armor.rotated(arms, number)) for number in range(3)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_a_guard_that_was_not_asked_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="a check for each guarded prompt: 4, got 3"):
        armor.expect(3, 4, "a check for each guarded prompt")


def test_a_stream_that_fails_is_no_measurement() -> None:
    bench = armor.Bench(Target("127.0.0.1", 9), Target("127.0.0.1", 9), armor.parse_args([]))
    with pytest.raises(RuntimeError, match="error no connection"):
        asyncio.run(bench.stream("window", 4, 2))


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        armor.parse_args(["latency"])
    assert "ttft, throughput, delay, guard, got latency" in capsys.readouterr().err


def test_the_guard_alone_is_timed_by_mode_speed_and_check(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    size = "--chars 400 --chars-per-s 800 --check-times 0.05 0.2 --repeats 2 --windows 40:80 400:400"
    armor.main(["guard", *size.split(), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    first = {(row["arm"], row["windows"][0], row["check_ms"]): row["first_text_ms"] for row in rows}
    assert len(first) == 6
    for check_ms in (50, 200):
        assert first["strict", 40, check_ms] >= 500 + check_ms  # 400 characters take half a second
        assert first["window", 40, check_ms] >= 130 + check_ms  # 104 of them
    assert first["window", 40, 50] < first["strict", 40, 50]
    calls = {(row["arm"], row["windows"][0]): row["answer_checks"] for row in rows if row["check_ms"] == 50}
    assert calls["strict", 40] == calls["window", 400] == 1 < calls["window", 40]
