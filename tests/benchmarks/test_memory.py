"""Pages that the benchmark counts are the engine's; latencies are of real steps."""

import json
from pathlib import Path

import latency
import memory
import plots
import pytest
import tables

from cabochon.engine.kv_layout import kv_layout


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_a_sequence_of_8192_tokens_takes_a_quarter_less_in_gemma_2(size: str) -> None:
    (row,) = memory.sequence(size, 16, [8192])
    layout = kv_layout(memory.model_of(size), 16, memory.BF16)
    assert row["kv_bytes"] <= layout.pages_per_sequence(8192, chunk_tokens=1) * layout.page_bytes
    assert row["kv_bytes_full_tables"] == 2 * 512 * layout.page_bytes
    assert float(str(row["saved_share"])) >= 0.249


def test_below_the_window_all_tables_are_full() -> None:
    (row,) = memory.sequence("2b", 16, [1024])
    assert row["saved_share"] == 0


def test_a_busy_engine_wastes_less_than_half_a_page_a_table_and_request() -> None:
    row = memory.busy("2b", 16, seqs=4, requests=8)
    assert 0 < float(str(row["unused_share_mean"])) <= float(str(row["unused_share_max"])) < 0.3
    coarse = memory.busy("2b", 256, seqs=4, requests=8)
    assert float(str(coarse["unused_share_mean"])) > 4 * float(str(row["unused_share_mean"]))


def test_latency_rows_have_every_case_and_their_spread(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = "--dtype fp32 --threads 1 --kv-cache-gib 0.01 --top-id 100 --rounds 2 --prompts 4 40"
    options += " --batches 1 3 --output-tokens 5 --prompt-tokens 4"
    latency.main(["--model", str(tiny_gemma2_dir), *options.split(), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cases = [("ttft", 4), ("ttft", 40), ("step", 1), ("step", 3)]
    summaries = [row for row in rows if "summary" in row]
    assert [(row["case"], row.get("prompt_tokens") or row["batch"]) for row in summaries] == cases
    assert len(rows) == 3 * len(cases)
    for row in summaries:
        assert 0 < row["ms_min_max"][0] <= row["ms"] <= row["ms_min_max"][1]


def test_backends_take_turns_and_have_their_ratio(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = "--dtype fp32 --threads 1 --kv-cache-gib 0.01 --top-id 100 --rounds 2 --prompts 4 40"
    options += " --batches 1 --output-tokens 5 --prompt-tokens 4 --backends native torch"
    latency.main(["--model", str(tiny_gemma2_dir), *options.split(), "--out", str(out)])
    rows = tables.read(out)
    summaries = [row for row in rows if "summary" in row]
    assert [row["attention_backend"] for row in rows] == ["native", "torch"] * 9
    for first, second in zip(summaries[::2], summaries[1::2], strict=True):
        assert "ratio" not in first
        low, high = second["ratio_min_max"]
        assert 0 < low <= second["ratio"] <= high
    assert len(tables.latency(rows)) == 2 + 6
    assert plots.engine_latency(rows) is not None
