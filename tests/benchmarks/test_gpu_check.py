"""The whole GPU check as a dry run: every phase that means something on a CPU, under a minute."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ("roofline", "parity", "same tokens", "decode 2b", "decode 9b", "prefill 9b", "offline")


@pytest.mark.slow
def test_a_dry_run_ends_well_and_measures_no_target(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", "cpu", "--tiny"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
    (path,) = tmp_path.glob("cpu-dry-run-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ends = {row["phase"]: row["status"] for row in rows if "status" in row}
    assert {name for name, status in ends.items() if status == "ok"} == set(RUN)
    assert set(ends.values()) == {"ok", "absent"}
    assert not [row for row in rows if "error" in row and "status" not in row]
    (parity,) = [row for row in rows if row.get("case") == "parity fp32"]
    assert parity["equal_tokens"] == parity["tokens"]
    assert run.stdout.count("not measured") == 7
    assert run.stdout.count("no row of this shape") == 4, "tiny shapes reach no target"


@pytest.mark.skipif(sys.platform != "linux", reason="nvidia-smi is looked for on PATH")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"}, check=False)
    assert run.returncode == 2
    assert "gpu-check must run where nvidia-smi finds an NVIDIA GPU, there is none" in run.stdout
    assert not list(tmp_path.iterdir())
