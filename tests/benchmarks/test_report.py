"""Plots and tables from small files of results; what the documents quote is what the files say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import report
import tables

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ENV = {"commit": "abc", "cpu": "A CPU", "cores": 2, "model": "demo"}


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("\n".join(json.dumps({**row, **ENV}) for row in rows))
    return path


def ramp(rate: float) -> dict[str, object]:
    figures = {f"{name}_p{p}_ms": 10.0 * rate * p for name in ("ttft", "itl") for p in (50, 99)}
    return {
        "summary": "median of 1",
        "benchmark": "serving",
        "arrivals": "ramp",
        "workload": "fixed",
        "rate": rate,
        "prompt_tokens": 8,
        "output_tokens": 4,
        "output_tok_per_s": 4 * rate,
        **figures,
        "spread": {name: [value, value] for name, value in figures.items()},
        "saturated": rate > 1,
        "ttft_curve_ms": [[0, 1.0], [50, 2.0 * rate], [100, 5.0 * rate]],
        "slo_met": 0.5,
        "client_cpu_share": 0.1,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    peers = [
        {"provider": name, "round": n, "output_tok_per_s": rate + n, "seqs": 2}
        for n in (1, 2, 3)
        for name, rate in (("cabochon", 20), ("other_engine", 10))
    ]
    ratio = {"ratio": 1.83, "ratio_min_max": [1.8, 1.9]}
    write(
        tmp_path / "offline.jsonl", *peers, {"summary": "", "cabochon": 22.0, "other_engine": 12.0, **ratio}
    )
    failed = [0.2, 0.2, None, 0.3, "http 429"]
    timeline = [[0.0, 0.0, 0.1, 0.5, "short"], [0.1, 0.1, 0.4, 0.6, "long"], failed]
    write(tmp_path / "serving.jsonl", ramp(1), ramp(2), {**ramp(1), "summary": "", "timeline": timeline})
    for_compare = {"benchmark": "compare", "workload": "batch"}
    ours = {**for_compare, "peer": "cabochon", "output_tok_per_s": 20.0, "round": 1}
    medians = [
        {**for_compare, "summary": "output_tok_per_s", "peer": name, "median": 20.0}
        for name in ("cabochon", "new")
    ]
    write(tmp_path / "compare.jsonl", ours, {**ours, "round": 2}, *medians)
    kernel = {"kernel": "rms_norm", "device": "GPU"}
    ours = {**kernel, "provider": "ours", "median_ms": 1, "share_of_copy": 0.9}
    write(tmp_path / "kernels.jsonl", ours, {**kernel, "provider": "eager", "share_of_copy": 0.3})
    return tmp_path


def test_every_result_has_its_picture_and_the_page_needs_no_other_file(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report.main([*map(str, sorted(results.glob("*.jsonl"))), "--out", str(out)])
    names = {path.stem for path in out.glob("*.png")}
    of_serving = {f"serving-{name}" for name in ("throughput-latency", "ttft", "timeline")}
    assert names == {"offline-rounds", "kernels-roofline", "compare-peers", *of_serving}
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    first = (out / "serving-ttft.png").read_bytes()
    report.main([str(results / "serving.jsonl"), "--out", str(out)])
    assert (out / "serving-ttft.png").read_bytes() == first, "equal rows give equal bytes"


def test_what_was_not_measured_has_no_plot(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", {"kernel": "geglu", "provider": "ours", "absent": True}, ramp(1))
    assert [one.stem for one in report.draw(tables.read(path), tmp_path / "out")] == ["one-ttft"]


def test_a_table_is_made_of_the_files_that_its_marker_names(results: Path) -> None:
    document = "before\n<!-- table: offline offline.jsonl -->\nold\n<!-- end of table -->\nafter\n"
    filled = tables.fill(document, results)
    assert filled.splitlines()[2:7] == [
        "|  | output tok/s, median of 3 |",
        "| --- | --- |",
        "| cabochon | 22 |",
        "| `other_engine` | 12 |",
        "| ratio, median (lowest, highest) | 1.83 (1.80, 1.90) |",
    ]
    assert filled.replace("\n".join(filled.splitlines()[2:7]), "old") == document
    assert tables.fill(filled, results) == filled
    with pytest.raises(ValueError, match="got nothing: correct the marker"):
        tables.fill(document.replace("table: offline", "table: nothing"), results)


def test_a_table_of_peers_has_each_engine_and_our_ratio() -> None:
    about = {"summary": "ttft_ms", "workload": "decode", "rounds": 2}
    theirs = {"ratios": {"cabochon": {"ratio": 0.5, "ratio_min_max": [0.4, 0.6]}}}
    rows: list[dict[str, Any]] = [
        {"round": 2, "workload": "decode", "peer": "cabochon", "ttft_ms": 50.0},
        {**about, "peer": "cabochon", "median": 50.0, "min_max": [49.0, 51.0]},
        {**about, "peer": "generate_batch", "median": 100.0, "min_max": [90.0, 1234.0], **theirs},
    ]
    assert tables.peers(rows)[2:] == [
        "| decode: first token | cabochon | 50 ms (49, 51) |  |",
        "| decode: first token | `generate_batch` | 100 ms (90, 1,234) | 0.50 (0.40, 0.60) |",
    ]


def test_a_serving_table_has_a_line_for_each_stage(results: Path) -> None:
    lines = tables.serving(tables.read(results / "serving.jsonl"))
    assert lines[2] == "| 1 req/s | 4 | 500 | 990 | 500 | 990 | 50 % | 10 % |"


def test_a_table_of_a_search_has_a_line_for_each_trial() -> None:
    slow, none = {"step_tokens": 128, "threads": 1}, {"step_tokens": 2048, "threads": 2}
    row = {
        "objective": "goodput",
        "flags": slow,
        "trials": [{"flags": slow, "value": 1.5}, {"flags": none, "reason": "at most 80% kept the SLO"}],
    }
    assert tables.tune([row]) == [
        "| `--step-tokens` | `--threads` | goodput |",
        "| --- | --- | --- |",
        "| 128 | 1 | 1.50 |",
        "| 2048 | 2 | at most 80% kept the SLO |",
    ]


def test_tables_of_model_armor_take_the_rows_of_their_case(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"case": "ttft", "unguarded_ms": 400.2, "prompt_ms": 403.4, "added_ms": 3.21, "check_ms": 250.0},
        {"case": "throughput", "unguarded": 100.4, "off": 99.6, "window": 98.6, "check_ms": 250.0},
        {"case": "delay", "arm": "window", "first_text_ms": 1370.0, "end_ms": 10200.0, "check_ms": 250.0},
    ]
    rows[0] |= {"added_quartiles_ms": [1.0, 5.0], "waited_for_verdict_mean_ms": 0.4}
    rows[0] |= {"prompt_tokens": 604, "pairs": 50}
    ratios = {"off": 0.99, "unguarded": 0.982}
    rows[1] |= {"ratios": {arm: {"ratio": of, "ratio_min_max": [0.97, 0.995]} for arm, of in ratios.items()}}
    rows[1] |= {"streams": 16, "output_tokens": 96, "answer_checks_per_stream": 3.15}
    rows[2] |= {"first_text_min_max_ms": [1300.0, 1400.0], "longest_gap_ms": 2000.0, "answer_checks": 6.0}
    rounds = [{"case": "throughput", "round": number} for number in (1, 2)]
    path = write(tmp_path / "armor.jsonl", *rounds, *({**row, "summary": "medians"} for row in rows))
    found = tables.read(path)
    assert tables.armor_ttft(found)[-1] == "| difference of a pair (quartiles) | 3.2 ms (1.0, 5.0) |"
    line = "| 16 × 96 | 100 | 100 | 99 | 0.99 (0.97, 0.99) | 0.98 (0.97, 0.99) | 3.1 |"
    assert tables.armor_throughput(found)[2:] == [line]
    line = "| `window` | 250 ms | 1.37 s (1.30, 1.40) | 10.20 s | 2.00 s | 6 |"
    assert tables.armor_delay(found)[2:] == [line]


@pytest.mark.parametrize("name", ["docs/performance.md", "docs/model-armor.md", "benchmarks/README.md"])
def test_documents_say_what_the_results_say(name: str) -> None:
    """If not: python benchmarks/report.py --tables docs/*.md benchmarks/README.md."""
    document = (ROOT / name).read_text()
    assert tables.MARKED.search(document)
    assert tables.fill(document) == document


def test_the_readme_names_every_benchmark() -> None:
    text = (BENCHMARKS / "README.md").read_text()
    programs = [path for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(programs) > 10
    for path in programs:
        assert f"`{path.name}`" in text, path.name
