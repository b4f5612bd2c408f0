"""The benchmark of the screen runs on a tiny model, after it has seen that both ways give the same tokens."""

import json
from pathlib import Path

import head_screen
import pytest

from cabochon.kernels.native.screen import can_screen


def test_both_ways_are_timed(
    tiny_gemma2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not can_screen():
        pytest.skip("a CPU without VNNI has no use for a screen")
    out = tmp_path / "rows.jsonl"
    words = f"x --model {tiny_gemma2_dir} --rows 1 3 --repeats 2 --out {out}"
    monkeypatch.setattr("sys.argv", words.split())
    head_screen.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["rows"] for row in rows] == [1, 3]
    assert all(row["ratio"] > 0 for row in rows)
    assert {"commit", "cpu", "cores", "command"} <= rows[0].keys()
