"""One function a plot: rows of result files in, a figure out. What has no rows is not drawn."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from peers_plot import peers
from plot_style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MODELS,
    OTHER,
    RED,
    SOFT,
    Row,
    about,
    amount,
    card,
    name_lines,
    percent,
    source,
)
from serving_plots import throughput_latency, timeline, ttft_distributions

ARM_KEYS = ("provider", "arm", "kind")  # what the rows of one round differ in
NOT_SHAPE = {
    "round", "output_tok_per_s", *ARM_KEYS, "file", "commit", "cpu", "cores", "torch", "transformers",
    "command", "model", "dtype", "device",
}  # fmt: skip


class Plot(NamedTuple):
    """name: of its file, without an ending. caption: the command that made the rows, if they say."""

    name: str
    figure: Figure
    caption: str


def all_plots(rows: Sequence[Row]) -> Iterator[Plot]:
    """Those that there are rows for, files in order."""
    for file, group in groupby(rows, key=lambda row: str(row["file"])):
        of_file = list(group)
        stem = file.removesuffix(".jsonl")
        for name, draw in DRAWN.items():
            figure = draw(of_file)
            if figure is not None:
                commands = dict.fromkeys(str(row["command"]) for row in of_file if row.get("command"))
                yield Plot(f"{stem}-{name}", figure, "\n".join(commands))


def arms(rows: Sequence[Row]) -> Figure | None:
    """Output tokens per second of each arm: a round is a dot, the median a bar, the spread a line."""
    rounds = [
        row
        for row in rows
        if "round" in row and "output_tok_per_s" in row and row.get("benchmark") not in ("serving", "compare")
    ]
    key = next((key for key in ARM_KEYS if rounds and all(key in row for row in rounds)), None)
    if key is None:
        return None
    shapes, shared = _told_apart([_shape(row) for row in rounds])
    groups: dict[str, tuple[str, list[float]]] = {}  # label: arm, values
    for row, shape in zip(rounds, shapes, strict=True):
        label = " · ".join(part for part in (str(row[key]), shape) if part)
        groups.setdefault(label, (str(row[key]), []))[1].append(row["output_tok_per_s"])
    names = list(dict.fromkeys(arm for arm, _ in groups.values()))
    figure, (axes,) = card(
        f"Output tokens per second: {', '.join(names)}",
        f"Median of interleaved rounds, each a dot; {about(rounds[0])}",
        source(rounds[0]),
        height_in=1.9 + 0.5 * len(groups),
        left=0.25,
    )
    axes.grid(axis="y", visible=False)
    longest = max(max(values) for _, values in groups.values())
    accent = "cabochon" if "cabochon" in names else names[-1]
    for y, (arm, values) in enumerate(groups.values()):
        axes.barh(y, np.median(values), height=0.56, color=BLUE if arm == accent else OTHER, zorder=2)
        axes.plot([min(values), max(values)], [y, y], color=INK, linewidth=1.2, zorder=3)
        axes.plot(values, [y] * len(values), "o", color=INK, markersize=3.4, markeredgecolor="white",
                  markeredgewidth=0.5, zorder=4)  # fmt: skip
        middle = amount(float(np.median(values)))
        axes.text(max(values) + longest * 0.02, y, middle, va="center", weight="bold")
    axes.set_yticks(range(len(groups)), groups, color=INK)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_xlim(0, longest * 1.12)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"output tok/s ({shared})")
    return figure


def engine_latency(rows: Sequence[Row]) -> Figure | None:
    """`latency.py`: first token by prompt, step by batch."""
    found = [row for row in rows if row.get("benchmark") == "latency" and "summary" in row]
    if not found:
        return None
    figure, panels = card(
        "The engine alone, idle otherwise",
        f"Median of rounds, line from lowest to highest; threads: {found[0]['threads']}; " + about(found[0]),
        source(found[0]), panels=2,
    )  # fmt: skip
    cases = (("ttft", "prompt_tokens", "Time to first token, one request", "tokens of the prompt"),
             ("step", "batch", "A decode step", "requests that decode together"))  # fmt: skip
    for axes, (case, size, title, label), colour in zip(panels, cases, (BLUE, GREEN), strict=True):
        of_case = [row for row in found if row["case"] == case]
        backends = list(dict.fromkeys(row.get("attention_backend", "") for row in of_case))
        for backend, shade in zip(backends, (colour, OTHER), strict=False):
            mine = [row for row in of_case if row.get("attention_backend", "") == backend]
            x, y = [row[size] for row in mine], [row["ms"] for row in mine]
            axes.plot(x, y, "o-", color=shade, markersize=5.5, label=backend)
            spreads = zip(*(row["ms_min_max"] for row in mine), strict=True)
            axes.vlines(x, *spreads, color=shade, linewidth=1.2)
            is_below = backend == backends[0] and len(backends) > 1
            where: dict[str, Any] = {"textcoords": "offset points", "weight": "bold", "size": 9}
            where |= {"ha": "center", "va": "top" if is_below else "bottom", "color": shade}
            for at, value in zip(x, y, strict=True):
                axes.annotate(f"{amount(value)} ms", (at, value), (0, -8 if is_below else 6), **where)
        if len(backends) > 1:
            axes.legend(frameon=False, loc="upper left")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{at:,}" for at in x])
        axes.minorticks_off()
        axes.margins(x=0.14)
        axes.set_ylim(0, max(row["ms_min_max"][1] for row in of_case) * 1.2)
        axes.set_title(title, pad=10)
        axes.set_xlabel(label)
    return figure


def kv_memory(rows: Sequence[Row]) -> Figure | None:
    """`memory.py`: pages of one sequence, beside tables of full length."""
    found = [row for row in rows if row.get("benchmark") == "memory" and row.get("case") == "sequence"]
    models = list(dict.fromkeys(str(row["model"]) for row in found))
    if not found:
        return None
    figure, panels = card(
        "KV memory of one sequence",
        "MiB in bf16 as the context grows: pages that leave the window go back to the pool",
        source(found[0]), panels=len(models), left=0.075,
    )  # fmt: skip
    for axes, model in zip(panels, models, strict=True):
        of_model = [row for row in found if row["model"] == model]
        x = [0, *(row["tokens"] / 1024 for row in of_model)]
        full, held = (
            [0, *(row[key] / 2**20 for row in of_model)] for key in ("kv_bytes_full_tables", "kv_bytes")
        )
        axes.fill_between(x, held, full, color=FAINT, zorder=1, linewidth=0)
        axes.plot(x, full, color=OTHER, zorder=2)
        axes.plot(x, held, color=BLUE, zorder=3)
        axes.set_title(MODELS.get(model, model), pad=8)
        axes.set_xlim(0, max(x))
        axes.set_ylim(0, full[-1] * 1.12)
        axes.set_xticks([0, 4, 8] if max(x) == 8 else [0, max(x)])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("× 1,024 tokens" if axes is panels[0] else "")
        words = f"−{percent(1 - held[-1] / full[-1])}"
        axes.text(max(x) * 0.96, full[-1] * 0.06, words, ha="right", size=12, weight="bold", color=BLUE)
        axes.text(max(x) * 0.05, full[-1] * 1.03, "full tables", color=SOFT, size=8.5, weight="bold")
        axes.text(max(x) * 0.05, full[-1] * 0.93, "ours", color=BLUE, size=8.5, weight="bold")
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """What each kernel and each whole step reaches of its roof, which was measured in the same run."""
    ours = [row for row in rows if row.get("provider", "ours") == "ours" and not row.get("is_dry_run")]
    found: dict[str, Row] = {}
    for row in ours:
        name = _roof_name(row)
        if name and _work(row) >= _work(found.get(name, {})):
            found[name] = row  # of a kernel's shapes the one with the most work
    if not found:
        return None
    figure, (axes,) = card(
        "How close to the roof",
        "Share of the limit that binds, measured in the same run; " + about(next(iter(found.values()))),
        source(next(iter(found.values()))), height_in=1.9 + 0.34 * len(found), left=0.3,
    )  # fmt: skip
    for y, row in enumerate(found.values()):
        share, colour = next((row[key], colour) for key, colour in ROOFS.items() if key in row)
        axes.barh(y, share * 100, height=0.6, color=colour, zorder=2)
        axes.text(
            share * 100 - 1.2,
            y,
            percent(share),
            va="center",
            ha="right",
            weight="bold",
            size=9,
            color="white",
        )
    axes.axvline(100, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(found)), found, color=INK)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    for index, (word, colour) in enumerate(
        (("memory: copy rate", BLUE), ("compute: bf16 product", RED), ("whole step: both", GREEN))
    ):
        figure.text(
            0.3 + 0.22 * index, 0.42 / figure.get_figheight(), word, color=colour, size=9, weight="bold"
        )
    return figure


def host_share(rows: Sequence[Row]) -> Figure | None:
    """`step_overhead.py`: what a step costs the host; the median of runs, a line from lowest to highest."""
    found = [row for row in rows if row.get("benchmark") == "step_overhead"]
    sizes = sorted({row["running"] for row in found})
    if len(sizes) < 2:
        return None
    figure, panels = card(
        "What a step costs the host",
        "Thread CPU time on one core, no device taking part; line from the lowest to the highest run",
        source(found[0]), panels=2,
    )  # fmt: skip
    for axes, (part, title) in zip(
        panels, (("prepare", "Schedule and prepare inputs"), ("results", "Enter results")), strict=True
    ):
        ends = []
        for share, colour in (("p50", BLUE), ("p99", RED)):
            values = [
                [row[f"{part}_{share}_ms"] for row in found if row["running"] == size] for size in sizes
            ]
            middle = [float(np.median(one)) for one in values]
            axes.plot(range(len(sizes)), middle, "o-", color=colour, markersize=5.5)
            axes.vlines(
                range(len(sizes)), *zip(*((min(one), max(one)) for one in values), strict=True), color=colour
            )
            ends.append((len(sizes) - 1, middle[-1], share, colour))
        axes.set_xlim(-0.15, len(sizes) - 0.72)
        axes.set_xticks(range(len(sizes)), map(str, sizes))
        axes.set_ylim(0, max(row[f"{part}_p99_ms"] for row in found) * 1.15)
        axes.set_ylabel("ms")
        axes.set_title(title, pad=10)
        axes.set_xlabel("running requests")
        name_lines(axes, ends)
    return figure


DRAWN = {
    "rounds": arms,
    "peers": peers,
    "throughput-latency": throughput_latency,
    "ttft": ttft_distributions,
    "timeline": timeline,
    "latency": engine_latency,
    "kv": kv_memory,
    "roofline": roofline,
    "host": host_share,
}
ROOFS = {"share_of_copy": BLUE, "share_of_product": RED, "share_of_roofline": GREEN}


def _shape(row: Row) -> dict[str, str]:
    return {name: str(value) for name, value in row.items() if name not in NOT_SHAPE}


def _told_apart(shapes: Sequence[dict[str, str]]) -> tuple[list[str], str]:
    """What is special in each shape, and what they share, in words."""
    shared = {name for name in shapes[0] if len({shape.get(name) for shape in shapes}) == 1}

    def words(shape: dict[str, str], *, is_shared: bool) -> str:
        parts = [
            f"{name.replace('_', ' ')} {value}"
            for name, value in shape.items()
            if (name in shared) == is_shared
        ]
        return ", ".join(parts)

    return [words(shape, is_shared=False) for shape in shapes], words(shapes[0], is_shared=True)


def _roof_name(row: Row) -> str | None:
    if "share_of_roofline" in row:
        return str(row.get("case") or "a whole step")
    if "share_of_product" in row:
        return "prefill attention"
    if "share_of_copy" in row:
        return str(row.get("kernel") or "decode attention").replace("_", " ")
    return None


def _work(row: Row) -> float:
    return float(row.get("median_ms") or row.get("step_ms") or row.get("ms") or 0.0)
