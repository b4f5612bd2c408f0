"""Tables of documents, from result files: what stands between two markers is written here and by nobody else.

    <!-- table: offline offline-epyc-2026-11-24.jsonl -->
    ...
    <!-- end of table -->

The first word names the table, the others its files in `results/`.
"""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- table: (\S+)((?: \S+)+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read(path: Path) -> list[Row]:
    """Its rows, each with the name of the file."""
    return [{**json.loads(line), "file": path.name} for line in path.read_text().splitlines() if line.strip()]


def fill(document: str, results: Path = RESULTS) -> str:
    """The document with every marked table made anew. Raises ValueError for a table that does not exist."""

    def table(found: re.Match[str]) -> str:
        begin, name, files, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"a table must be one of {', '.join(TABLES)}, got {name}: correct the marker")
        rows = [row for file in files.split() for row in read(results / file)]
        return "\n".join([begin.rstrip("\n"), *TABLES[name](rows), end])

    return MARKED.sub(table, document)


def offline(rows: Sequence[Row]) -> list[str]:
    """`offline.py`: each engine, and the ratio of the rounds."""
    (summary,) = _summaries(rows)
    providers = dict.fromkeys(row["provider"] for row in rows if "provider" in row)
    cells = [(_code(name), f"{summary[name]:.0f}") for name in providers]
    cells.append(("ratio, median (lowest, highest)", _ratio(summary, 2)))
    return _table(("", f"output tok/s, median of {_rounds(rows)}"), cells)


def lora(rows: Sequence[Row]) -> list[str]:
    """`lora.py`: a line for each file."""
    cells = [
        (f"{row['rank']}", f"`results/{row['file']}`", f"{row['base']:.0f}", _ratio(row, 2))
        for row in _summaries(rows)
    ]
    ratio = f"ratio with adapters, median of {_rounds(rows)} (lowest, highest)"
    return _table(("rank", "file", "base, output tok/s", ratio), cells)


def structured(rows: Sequence[Row]) -> list[str]:
    """`structured.py`: without and with a schema."""
    (summary,) = _summaries(rows)
    cells = [
        ("without a schema", f"{summary['plain']:.0f}"),
        ("with one", f"{summary['schema']:.0f}"),
        ("ratio, median (lowest, highest)", _ratio(summary, 2)),
    ]
    return _table(("", f"output tok/s, median of {_rounds(rows)}"), cells)


def startup(rows: Sequence[Row]) -> list[str]:
    """`startup.py`: medians of all starts."""
    (summary,) = _summaries(rows)
    median = {name.removeprefix("median_"): value for name, value in summary.items()}
    gaps = f"{median['longest_gap_ms']:.0f} ms ({median['usual_gap_ms']:.0f} ms)"
    cells = [
        ("`cabochon serve` to the first 200 of `/health`", f"{median['ready_s']:.1f} s"),
        ("first structured answer, beside the stream", f"{median['structured_s']:.1f} s"),
        ("longest time between two tokens of the stream (median of all)", gaps),
        ("engine process, resident once ready", f"{median['engine_resident_mib']:,.0f} MiB"),
        ("its peak while loading ÷ resident", f"{median['peak_over_resident']:.2f}"),
        ("process that has read the tokenizer for grammars", f"{median['grammar_resident_mib']:,.0f} MiB"),
        ("server process", f"{median['server_resident_mib']:,.0f} MiB"),
    ]
    starts = sum("start" in row for row in rows)
    return _table(("", f"median of {starts}"), cells)


def step_overhead(rows: Sequence[Row]) -> list[str]:
    """`step_overhead.py`: median of runs, lowest and highest."""
    cells = []
    for size in sorted({row["running"] for row in rows}):
        of_size = [row for row in rows if row["running"] == size]
        names = [f"{part}_{percent}_ms" for part in ("prepare", "results") for percent in ("p50", "p99")]
        if all("arrival_p50_ms" in row for row in of_size):
            names.append("arrival_p50_ms")
        cells.append((f"{size}", *(_spread([row[name] for row in of_size]) for name in names)))
    head = ("running", "prepare, p50 (ms)", "prepare, p99", "results, p50", "results, p99", "arrival, p50")
    head = head[: len(cells[0])]
    return _table(head, cells)


def tune(rows: Sequence[Row]) -> list[str]:
    """`tune.py`: a line for each trial of a search, in its order."""
    (row,) = rows
    names = list(row["flags"])
    cells = [
        (
            *(f"{trial['flags'][name]:g}" for name in names),
            f"{trial['value']:.2f}" if "value" in trial else str(trial["reason"]),
        )
        for trial in row["trials"]
    ]
    return _table((*(f"`--{name.replace('_', '-')}`" for name in names), row["objective"]), cells)


def memory(rows: Sequence[Row]) -> list[str]:
    """`memory.py`: KV bytes of one sequence, and what a busy engine leaves unused of its pages."""
    busy = {row["model"]: row for row in rows if row.get("case") == "busy"}
    sequences = [row for row in rows if row.get("case") == "sequence"]
    cells = []
    for model, row in busy.items():
        longest = max((one for one in sequences if one["model"] == model), key=lambda one: one["tokens"])
        cells.append(
            (
                "Gemma 3 270M (demo)" if model == "demo" else f"Gemma 2 {model.upper()}",
                f"{longest['tokens']:,}",
                f"{longest['kv_bytes'] / 2**20:,.0f} MiB",
                f"{longest['saved_share'] * 100:.1f} %",
                f"{row['unused_share_mean'] * 100:.1f} % ({row['unused_share_max'] * 100:.1f} %)",
            )
        )
    head = ("", "tokens", "KV of one sequence", "less than full tables", "unused in used pages, mean (max)")
    return _table(head, cells)


def processes(rows: Sequence[Row]) -> list[str]:
    """`memory.py --processes`."""
    cells = [
        (row["process"], row["when"], f"{row['rss_mib']:,} MiB", f"{row['pss_mib']:,} MiB")
        for row in rows
        if row.get("case") == "processes"
    ]
    return _table(("process", "when", "resident (RSS)", "proportional (PSS)"), cells)


def latency(rows: Sequence[Row]) -> list[str]:
    """`latency.py`: a line for each case."""
    cells = []
    for row in _summaries(rows):
        is_first = row["case"] == "ttft"
        what = f"first token, prompt of {row['prompt_tokens']:,}" if is_first else f"a step of {row['batch']}"
        low, high = row["ms_min_max"]
        took = f"{row['ms']:.0f} ms ({low:.0f}, {high:.0f})"
        cells.append((what, row.get("attention_backend", ""), took, _ratio(row, 2) if "ratio" in row else ""))
    head = ("", "backend", f"median of {_rounds(rows)} (lowest, highest)", "÷ the first backend's")
    return _table(head, cells)


def serving(rows: Sequence[Row]) -> list[str]:
    """`serving.py`: a line for each stage or arm."""
    cells = []
    for row in _summaries(rows):
        if "ttft_p50_ms" not in row:  # the ratio of head-of-line
            continue
        names = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
        load = f"{row['rate']:g} req/s" if "rate" in row else f"{row.get('concurrency', 'trace')} at once"
        cells.append(
            (
                ", ".join(part for part in (load, row.get("arm", "")) if part),
                f"{row['output_tok_per_s']:,.0f}",
                *(f"{row[name]:,.0f}" for name in names),
                f"{row['slo_met'] * 100:.0f} %",
                f"{row['client_cpu_share'] * 100:.0f} %",
            )
        )
    head = ("load", "output tok/s", "TTFT p50 (ms)", "p99", "ITL p50 (ms)", "p99", "SLO met", "client's CPU")
    return _table(head, cells)


def peers(rows: Sequence[Row]) -> list[str]:
    """`compare.py`: each figure of each engine, and ours over it."""
    cells = []
    for row in _summaries(rows):
        what, unit = PEER_FIGURES[row["summary"]]
        low, high = row["min_max"]
        ratio = row.get("ratios", {}).get("cabochon", {})
        cells.append(
            (
                f"{row['workload']}: {what}",
                _code(row["peer"]),
                f"{row['median']:,.4g} {unit} ({low:,.4g}, {high:,.4g})",
                _ratio(ratio, 2) if ratio.get("ratio") else "",
            )
        )
    head = ("workload", "engine", f"median of {_rounds(rows)} (lowest, highest)", "cabochon ÷ it")
    return _table(head, cells)


def head_screen(rows: Sequence[Row]) -> list[str]:
    """`head_screen.py`: a line for each number of rows."""
    cells = [
        (f"{row['rows']}", f"{row['head_ms']:.1f} ms", f"{row['screen_ms']:.1f} ms", f"{row['ratio']:.2f}")
        for row in rows
    ]
    return _table(("rows", "by logits", "by the screen", f"ratio, median of {rows[0]['repeats']}"), cells)


def linear(rows: Sequence[Row]) -> list[str]:
    """`linear.py`: a line for each number of rows."""
    cells = [
        (f"{row['rows']}", f"{row['onednn_ms']:.1f} ms", f"{row['ours_ms']:.1f} ms", f"{row['ratio']:.2f}")
        for row in rows
    ]
    return _table(("rows", "oneDNN", "C", f"ratio, median of {rows[0]['repeats']}"), cells)


def quality(rows: Sequence[Row]) -> list[str]:
    """`quantization_quality.py`: a line for each approximation."""
    cells = [
        (
            row["variant"],
            f"{row['kl_mean']:.2g}",
            f"{row['kl_p99']:.2g}",
            f"{row['same_top1'] * 100:.1f} %",
            f"{row['perplexity']:.2f}",
        )
        for row in rows
    ]
    exact = f"perplexity (fp32: {rows[0]['perplexity_fp32']:.2f})"
    return _table(("", "KL, mean (nats)", "KL, 99th percentile", "same likeliest token", exact), cells)


PEER_FIGURES = {
    "output_tok_per_s": ("output", "tok/s"),
    "decode_tok_per_s": ("decode", "tok/s"),
    "ttft_ms": ("first token", "ms"),
    "ready_s": ("ready", "s"),
    "pss_mib": ("memory (PSS)", "MiB"),
}


def armor_ttft(rows: Sequence[Row]) -> list[str]:
    """`armor.py ttft`: first tokens without and with a prompt's check, and the difference of the pairs."""
    (row,) = _summaries(rows, "ttft")
    low, high = row["added_quartiles_ms"]
    cells = [
        (
            f"prompt of about {row['prompt_tokens']:,} tokens, nothing checked",
            f"{row['unguarded_ms']:.0f} ms",
        ),
        (f"prompt checked, {row['check_ms']:.0f} ms away", f"{row['prompt_ms']:.0f} ms"),
        ("a ready first token waited for its verdict, mean", f"{row['waited_for_verdict_mean_ms']:.1f} ms"),
        ("difference of a pair (quartiles)", f"{row['added_ms']:.1f} ms ({low:.1f}, {high:.1f})"),
    ]
    return _table(("", f"first token, median of {row['pairs']} pairs"), cells)


def armor_throughput(rows: Sequence[Row]) -> list[str]:
    """`armor.py throughput`: nothing checked, prompts alone (mode off), and answers in windows too."""
    cells = [
        (
            f"{row['streams']} × {row['output_tokens']}",
            *(f"{row[arm]:.0f}" for arm in ("unguarded", "off", "window")),
            *(_ratio(row["ratios"][base], 2) for base in ("off", "unguarded")),
            f"{row['answer_checks_per_stream']:.1f}",
        )
        for row in _summaries(rows, "throughput")
    ]
    arms = ("nothing checked", "`off`", "`window`", "`window` ÷ `off` (lowest, highest)", "÷ nothing checked")
    return _table(("streams × tokens", *arms, "checks of an answer"), cells)


def armor_delay(rows: Sequence[Row]) -> list[str]:
    """`armor.py delay`: a line for each mode and time of a check."""
    cells = []
    for row in _summaries(rows, "delay"):
        low, high = row["first_text_min_max_ms"]
        cells.append(
            (
                "nothing checked" if row["arm"] == "unguarded" else f"`{row['arm']}`",
                "" if row["arm"] == "unguarded" else f"{row['check_ms']:.0f} ms",
                f"{row['first_text_ms'] / 1e3:.2f} s ({low / 1e3:.2f}, {high / 1e3:.2f})",
                f"{row['end_ms'] / 1e3:.2f} s",
                f"{row['longest_gap_ms'] / 1e3:.2f} s",
                f"{row['answer_checks']:.0f}",
            )
        )
    head = ("mode", "check", "first text, median (lowest, highest)", "end", "longest gap", "calls")
    return _table(head, cells)


def armor_guard(rows: Sequence[Row]) -> list[str]:
    """`armor.py guard`: a line for each mode, size of windows, speed and time of a check."""
    cells = []
    for row in _summaries(rows, "guard"):
        first, longest = row["windows"]
        cells.append(
            (
                "`strict`" if row["arm"] == "strict" else f"`window`, {first} to {longest}",
                f"{row['chars_per_s']:g} characters/s",
                f"{row['check_ms']:.0f} ms",
                *(f"{row[name] / 1e3:.2f} s" for name in ("first_text_ms", "end_ms", "longest_gap_ms")),
                f"{row['answer_checks']:.0f}",
            )
        )
    head = ("mode", "generated", "check", "first text", "end", "longest pause", "calls")
    return _table(head, list(dict.fromkeys(cells)))  # strict is the same whatever the windows


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "offline": offline,
    "lora": lora,
    "structured": structured,
    "startup": startup,
    "step-overhead": step_overhead,
    "tune": tune,
    "memory": memory,
    "processes": processes,
    "latency": latency,
    "serving": serving,
    "head-screen": head_screen,
    "linear": linear,
    "quality": quality,
    "peers": peers,
    "armor-ttft": armor_ttft,
    "armor-throughput": armor_throughput,
    "armor-delay": armor_delay,
    "armor-guard": armor_guard,
}


def _summaries(rows: Sequence[Row], case: str | None = None) -> list[Row]:
    return [row for row in rows if "summary" in row and case in (None, row.get("case"))]


def _rounds(rows: Sequence[Row]) -> int:
    return max(int(row["round"]) for row in rows if "round" in row)


def _ratio(row: Row, digits: int) -> str:
    low, high = row["ratio_min_max"]
    return f"{row['ratio']:.{digits}f} ({low:.{digits}f}, {high:.{digits}f})"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


def _code(name: str) -> str:
    """transformers `generate_batch`: names of functions in code."""
    return re.sub(r"\b\w+_\w+\b", r"`\g<0>`", name)


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]
