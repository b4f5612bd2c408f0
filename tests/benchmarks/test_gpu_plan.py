"""What a GPU check runs: programs that exist, and take the arguments they are given."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import gpu_plan
import pytest
from gpu_targets import TARGETS
from phases import Phase

PHASES = gpu_plan.gpu_phases()


def script(phase: Phase) -> Path:
    return next(Path(part) for part in phase.argv if part.endswith(".py"))


def test_every_target_has_a_phase() -> None:
    assert {target.phase for target in TARGETS} <= {phase.name for phase in PHASES}


def test_names_are_unique_and_checks_come_before_benchmarks_of_the_engine() -> None:
    names = [phase.name for phase in PHASES]
    assert len(set(names)) == len(names)
    assert names.index("same tokens") < names.index("decode 2b")


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_each_program_takes_its_arguments(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run up to the end of its parser."""
    path = script(phase)
    given = phase.argv[phase.argv.index(str(path)) + 1 :]
    monkeypatch.setattr(sys, "argv", [str(path), *given])
    parsed: list[object] = []

    class Parsed(Exception):
        pass

    def parse(self: object) -> None:
        parsed.append(original(self))
        raise Parsed

    import argparse  # patched for this test alone

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")
    assert parsed


def test_without_a_gpu_only_what_is_tiny_runs() -> None:
    phases = gpu_plan.cpu_phases()
    assert [phase.name for phase in phases] == [phase.name for phase in PHASES]
    runnable = {phase.name for phase in phases if phase.absent is None}
    assert runnable == {
        "roofline", "parity", "same tokens", "decode 2b", "decode 9b", "prefill 9b", "offline",
    }  # fmt: skip
    assert all(phase.absent in (None, "needs an NVIDIA GPU") for phase in phases)


def test_the_sanitizer_is_found_beside_cuda_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_plan, "SANITIZER_FOLDERS", (str(tmp_path / "cuda"),))
    assert {phase.absent for phase in gpu_plan.sanitizer_phases()} == {"compute-sanitizer is not installed"}
    (tmp_path / "cuda").mkdir()
    tool = tmp_path / "cuda" / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    phases = gpu_plan.sanitizer_phases()
    assert [phase.argv[:3] for phase in phases] == [
        (str(tool), "--tool", "memcheck"),
        (str(tool), "--tool", "racecheck"),
    ]
    assert {phase.absent for phase in phases} == {None}


def test_result_files_are_named_after_gpu_and_day() -> None:
    import datetime

    check = runpy.run_path(str(gpu_plan.ROOT / "benchmarks" / "gpu_check.py"), run_name="gpu_check")
    day = datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC)
    named = check["result_file"](Path("out"), "NVIDIA H100 80GB HBM3", day)
    assert named == Path("out/h100-80gb-hbm3-2026-11-25.jsonl")
    assert check["result_file"](Path("x.jsonl"), "NVIDIA H200", day) == Path("x.jsonl")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "cpu"], "--device cpu and --tiny go together"),
        (["--device", "cpu", "--tiny"], "a dry run needs --out"),
    ],
)
def test_a_dry_run_is_no_result(args: list[str], message: str) -> None:
    command = [sys.executable, str(gpu_plan.ROOT / "benchmarks" / "gpu_check.py"), *args]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert re.search(message, run.stderr)
