"""Plots of what `serving.py` measured: the price of load, distributions of first tokens, single requests."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import BLUE, CYCLE, INK, ORANGE, RED, Row, about, card, log_ticks, name_lines, source


def throughput_latency(rows: Sequence[Row]) -> Figure | None:
    """What more load costs each request, up to saturation: a ramp of `serving.py`."""
    stages = [row for row in rows if _is_serving(row) and "summary" in row and row.get("arrivals") == "ramp"]
    if len(stages) < 2:
        return None
    figure, panels = card(
        "More load: what a request waits",
        f"Poisson arrivals, {_lengths(stages[0])}, stage by stage until the server falls behind (hollow); "
        + about(stages[0]),
        source(stages[0]), panels=2,
    )  # fmt: skip
    titles = {"Time to first token": ("ttft_p50", "ttft_p99"), "Between tokens": ("itl_p50", "itl_p99")}
    for axes, (title, names) in zip(panels, titles.items(), strict=True):
        _curves(axes, stages, names)
        axes.set_title(title, pad=10)
        axes.set_xlabel("output tok/s of the server")
    return figure


def _curves(axes: Axes, stages: Sequence[Row], names: Sequence[str]) -> None:
    x = [row["output_tok_per_s"] for row in stages]
    ends, shown = [], []
    for name, colour in zip(names, (BLUE, RED), strict=True):
        y = [row[f"{name}_ms"] for row in stages]
        spread = [row["spread"][f"{name}_ms"] for row in stages]
        axes.plot(x, y, color=colour, zorder=2)
        axes.vlines(
            x, [low for low, _ in spread], [high for _, high in spread], color=colour, linewidth=1, alpha=0.6
        )
        for at, value, row in zip(x, y, stages, strict=True):
            face = "white" if row.get("saturated") else colour
            axes.plot(at, value, "o", color=colour, markerfacecolor=face, markersize=5.5, zorder=3)
        ends.append((x[-1], y[-1], name.split("_")[1], colour))
        shown += [value for pair in spread for value in pair]
    axes.set_yscale("log")
    axes.set_ylim(min(shown) / 1.5, max(shown) * 1.7)
    log_ticks(axes.yaxis, shown, " ms")
    axes.set_xlim(0, max(x) * 1.14)
    name_lines(axes, ends)


def ttft_distributions(rows: Sequence[Row]) -> Figure | None:
    """Which share of requests had its first token by when; a line for each stage or arm."""
    drawn = [row for row in rows if _is_serving(row) and "summary" in row and row.get("ttft_curve_ms")]
    if not drawn:
        return None
    figure, (axes,) = card(
        "Time to first token: which share has it by when",
        f"{drawn[0]['workload']} workload, {_lengths(drawn[0])}, round of the median; " + about(drawn[0]),
        source(drawn[0]),
    )  # fmt: skip
    shown: list[float] = []
    colours = _ordered(len(drawn)) if len(drawn) > 3 else CYCLE
    for index, (row, colour) in enumerate(zip(drawn, colours, strict=False)):
        percents, times = zip(*row["ttft_curve_ms"], strict=True)
        axes.plot(times, percents, color=colour)
        shown += times
        height = 0.05 + 0.065 * (len(drawn) - 1 - index)  # lines cross: names in a column, in their order
        where: dict[str, Any] = {"transform": axes.transAxes, "ha": "right"}
        axes.text(0.985, height, _load(row), color=colour, weight="bold", size=9, **where)
    axes.set_xscale("log")
    log_ticks(axes.xaxis, shown, " ms")
    axes.set_xlim(min(shown) / 1.15, max(shown) * 1.6)
    axes.set_ylim(0, 102)
    axes.set_yticks([0, 25, 50, 75, 90, 100], ["0 %", "25 %", "50 %", "75 %", "90 %", "100 %"])
    axes.set_xlabel("after the request was due")
    return figure


def _ordered(count: int) -> list[Any]:
    """Colours for loads in their order, dark to light."""
    return [mpl.colormaps["viridis"](0.85 * index / (count - 1)) for index in range(count)]


def timeline(rows: Sequence[Row]) -> Figure | None:
    """Every request a line: waiting for its first token, then its answer."""
    row = next((row for row in reversed(rows) if row.get("timeline")), None)
    if row is None:
        return None
    times = row["timeline"]
    figure, (axes,) = card(
        "Requests over time",
        f"The first {len(times)} after the warm-up, {_load(row)}, {_lengths(row)}; " + about(row),
        source(row), height_in=min(6.4, 2.4 + 0.035 * len(times)), left=0.06,
    )  # fmt: skip
    kinds = set()
    for y, (due, _, first, end, kind) in enumerate(times):
        if first is None:
            axes.hlines(y, due, end, color=RED, linewidth=2)
            kinds.add("failed")
            continue
        wait = INK if kind == "long" else ORANGE
        axes.hlines(y, due, first, color=wait, linewidth=2)
        axes.hlines(y, first, end, color=BLUE, linewidth=2, alpha=0.85)
        kinds.add("long" if kind == "long" else "usual")
    words = [("waits for its first token", ORANGE), ("answer comes", BLUE)]
    words += [("long prompt waits", INK)] * ("long" in kinds) + [("failed", RED)] * ("failed" in kinds)
    for index, (word, colour) in enumerate(words):
        height = 0.98 - 0.2 * (index + 1) / (axes.get_position().height * figure.get_figheight())
        where: dict[str, Any] = {"transform": axes.transAxes, "ha": "right"}
        axes.text(0.985, height, word, color=colour, weight="bold", size=9, **where)
    axes.set_ylim(len(times), -1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    return figure


def _is_serving(row: Row) -> bool:
    return row.get("benchmark") == "serving"


def _lengths(row: Row) -> str:
    """Tokens of prompt and answer as they really were, if the row says."""
    prompt, output = (
        row.get(f"{part}_tokens_mean") or row.get(f"{part}_tokens") for part in ("prompt", "output")
    )
    return f"{prompt:,.0f} in, {output:,.0f} out"


def _load(row: Row) -> str:
    if row.get("arrivals") == "closed":
        load = f"{row['concurrency']} at once"
    else:
        load = f"{row['rate']:g} req/s" if "rate" in row else "trace"
    return f"{load}, {row['arm']}" if "arm" in row else load
