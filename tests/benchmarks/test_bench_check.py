"""The gate: it holds this commit to its baseline, counts alike twice, and sees what was made worse."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import bench_check
import counters
import pytest

from cabochon.engine.core import EngineCore
from cabochon.engine.linear import Linear
from cabochon.engine.messages import GenerateRequest

Group = Callable[[], Any]
LOOP = """
def loop(count):
    total = 0
    for row in range(count):
        total += row
        total -= 1
"""


def worse(group: Group) -> list[str]:
    """What the gate says of one group's counts."""
    baseline = bench_check.read(bench_check.BASELINE)
    found = bench_check.count([group])
    return bench_check.judge(found, {name: baseline[name] for name in found})


def named(lines: list[str]) -> set[str]:
    return {line.split(":")[0] for line in lines}


def test_this_commit_is_no_worse_than_its_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_check.main([]) == 0, capsys.readouterr().err


def test_counts_are_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_check, "RUNNING", 16)
    for group in (bench_check.host, bench_check.device):
        assert bench_check.count([group]) == bench_check.count([group])


def of_our_package(source: str) -> dict[str, Any]:
    """What `source` defines, as if it stood in a file of the engine: lines of tests are not counted."""
    code: CodeType = compile(source, f"{counters.ROOT}/engine/seeded.py", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_a_loop_over_rows_in_each_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, stats = of_our_package(LOOP)["loop"], EngineCore.stats

    def slower(self: EngineCore) -> Any:
        loop(2 * bench_check.RUNNING)
        return stats(self)

    monkeypatch.setattr(EngineCore, "stats", slower)
    assert "python lines per row and step, 256 running" in named(worse(bench_check.host))


def test_longer_messages_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = bench_check.encode
    monkeypatch.setattr(
        bench_check, "encode", lambda message: encode(message) + b"x" * 20 * bench_check.RUNNING
    )
    assert named(worse(bench_check.host)) == {"bytes between the processes per token, 256 running"}


def test_more_operators_and_more_padding_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = Linear.__call__

    def copying(self: Linear, x: Any) -> Any:
        return multiply(self, x.clone().clone().clone().clone())

    monkeypatch.setattr(Linear, "row_multiple", 16)
    monkeypatch.setattr(Linear, "__call__", copying)
    found = named(worse(bench_check.device))
    assert "torch operators per layer of a decode step" in found
    assert "rows of products over rows that are needed" in found


def test_a_cache_that_finds_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    add = EngineCore.add
    salts = iter(range(1000))

    def salted(self: EngineCore, request: GenerateRequest) -> None:
        add(self, dataclasses.replace(request, cache_salt=f"{next(salts)}"))

    monkeypatch.setattr(EngineCore, "add", salted)
    assert named(worse(bench_check.engine)) == {"prompt tokens computed of a prompt seen before"}


def test_a_count_fails_above_a_tenth_more_and_by_another_name() -> None:
    baseline = {"pages": 10.0, "calls": 100.0}
    assert bench_check.judge({"pages": 11.0, "calls": 1.0}, baseline) == []
    (line,) = bench_check.judge({"pages": 11.2, "calls": 100.0}, baseline)
    assert line.startswith("pages: at most 11 allowed, got 11.2 (+12%): find what added it")
    (line,) = bench_check.judge({"pages": 10.0}, baseline)
    assert "must have the same names, got ['calls']" in line


def test_the_program_writes_a_baseline_and_fails_on_what_is_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "baseline.json"
    monkeypatch.setattr(bench_check, "GROUPS", (lambda: iter([("pages", 10.0)]),))
    assert bench_check.main(["--update", "--baseline", str(path)]) == 0
    assert bench_check.main(["--baseline", str(path)]) == 0
    monkeypatch.setattr(bench_check, "GROUPS", (lambda: iter([("pages", 12.0)]),))
    assert bench_check.main(["--baseline", str(path)]) == 1
    said = capsys.readouterr()
    assert "+20.0%  pages" in said.out
    assert "pages: at most 11 allowed, got 12" in said.err
