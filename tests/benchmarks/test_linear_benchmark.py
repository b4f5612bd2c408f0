"""The benchmark of products runs on a tiny model's shapes."""

import json
from pathlib import Path

import linear as benchmark
import pytest

from cabochon.kernels.native.linear import can_multiply


def test_both_products_are_timed(
    tiny_gemma2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    words = f"x --model {tiny_gemma2_dir} --rows 1 6 --repeats 2 --out {out}"
    monkeypatch.setattr("sys.argv", words.split())
    if not can_multiply():
        with pytest.raises(SystemExit, match="must be ours here, got oneDNN's: take"):
            benchmark.main()
        return
    benchmark.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["rows"] for row in rows] == [1, 6]
    assert all(row["ratio"] > 0 for row in rows)
    assert {"commit", "cpu", "cores", "command"} <= rows[0].keys()
