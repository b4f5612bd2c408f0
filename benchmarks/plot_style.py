"""How our plots look: one card, one palette, names beside the lines instead of a legend.

A plot is a white card with round corners on a transparent ground, so that it stands well on a light page
and on a dark one. Colours are Okabe and Ito's, which people with any colour vision can tell apart.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

Row = dict[str, Any]  # of a file of results, with its name as `file`
BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#C8B400",
)  # fmt: skip
CYCLE = (BLUE, RED, GREEN, ORANGE, PINK, SKY, YELLOW)
INK, SOFT, FAINT, OTHER = "#1f2430", "#667085", "#e4e7ec", "#b3bac5"
MODELS = {"demo": "Gemma 3 270M", "2b": "Gemma 2 2B", "9b": "Gemma 2 9B", "27b": "Gemma 2 27B"}
FONTS = ("Inter", "DejaVu Sans")
WIDTH_IN = 8.4  # at 200 dots an inch twice the width of a README
DPI = 200

RC: Any = {
    "font.size": 10, "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": OTHER,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.facecolor": "none",
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "lines.linewidth": 2.2, "lines.solid_capstyle": "round", "figure.facecolor": "none",
    "savefig.facecolor": "none",
}  # fmt: skip


@contextmanager
def styled() -> Iterator[None]:
    """While figures are made and saved."""
    there = {font.name for font in mpl.font_manager.fontManager.ttflist}
    families = [name for name in FONTS if name in there]
    with mpl.rc_context({**RC, "font.family": families}):
        yield


def card(
    title: str, subtitle: str, source: str, *, height_in: float = 4.3, panels: int = 1, left: float = 0.09
) -> tuple[Figure, list[Axes]]:
    """A figure with its words, and `panels` axes side by side. left: of the first, a share of the width."""
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
    figure.add_artist(_ground(height_in))
    figure.text(0.03, 1 - 0.2 / height_in, title, size=14, weight="bold", va="top")
    figure.text(0.03, 1 - 0.49 / height_in, subtitle, size=9, color=SOFT, va="top")
    figure.text(0.03, 0.16 / height_in, source, size=7.5, color=SOFT, va="bottom")
    head_in = 1.12 if panels > 1 else 0.9  # panels have titles of their own
    gap = 0.26 if panels < 3 else 0.42  # of a panel's width, for its ticks
    grid = figure.add_gridspec(
        1, panels, left=left, right=0.95, top=1 - head_in / height_in, bottom=0.86 / height_in, wspace=gap
    )
    return figure, [figure.add_subplot(grid[0, index]) for index in range(panels)]


def _ground(height_in: float) -> FancyBboxPatch:
    """The card itself, in inches, so that its corners are round."""
    inset, radius = 0.03, 0.14
    return FancyBboxPatch(
        (inset / WIDTH_IN, inset / height_in), 1 - 2 * inset / WIDTH_IN, 1 - 2 * inset / height_in,
        boxstyle=f"round,pad=0,rounding_size={radius / WIDTH_IN}", mutation_aspect=WIDTH_IN / height_in,
        facecolor="#ffffff", edgecolor="#d5d9e0", linewidth=0.8, zorder=-10,
    )  # fmt: skip


def name_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.07) -> None:
    """Names at the right ends of lines: (x, y, name, colour) in data units, pushed apart where they meet.

    gap: least distance, as a share of the height.
    """
    to_share = axes.transData + axes.transAxes.inverted()
    placed = []
    for x, y, name, colour in ends:
        share_x, share_y = to_share.transform((x, y))
        placed.append((float(share_y), float(share_x), name, colour))
    placed.sort()
    heights = _spread([y for y, _, _, _ in placed], gap)
    where: dict[str, Any] = {"transform": axes.transAxes, "va": "center", "size": 9, "weight": "bold"}
    for height, (_, x, name, colour) in zip(heights, placed, strict=True):
        axes.text(x + 0.03, height, name, color=colour, **where)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as a simple pass needs so that none is closer than `gap`."""
    for _ in range(50):
        for index in range(1, len(heights)):
            short = gap - (heights[index] - heights[index - 1])
            if short > 1e-6:
                heights[index] += short / 2
                heights[index - 1] -= short / 2
    return heights


def log_ticks(axis: Axis, values: Sequence[float], unit: str) -> None:
    """1, 2, 5, 10 ... on a logarithmic axis, in plain numbers with a unit, around `values`."""
    low, high = min(values), max(values)
    steps = [base * 10.0**power for power in range(-4, 8) for base in (1, 2, 5)]
    ticks = [step for step in steps if low / 2.1 <= step <= high * 2.1]
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith(("1", "5"))]
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axis.set_major_locator(mpl.ticker.FixedLocator(ticks))
    axis.set_minor_locator(mpl.ticker.NullLocator())
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{amount(x)}{unit}"))


def percent(share: float, digits: int = 0) -> str:
    """98.5 %."""
    return f"{share * 100:.{digits}f} %"


def amount(value: float) -> str:
    """12,345 and 123 and 1.23 and 0.012: three digits, no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def about(row: Row) -> str:
    """Model and machine of a row."""
    model = " ".join(MODELS.get(str(row[key]), str(row[key])) for key in ("model", "dtype") if row.get(key))
    cpu = str(row.get("cpu", ""))
    for noise in ("(R)", "(TM)", " Processor"):
        cpu = cpu.replace(noise, "")
    machine = f"{row['cores']} cores of {cpu.strip()}" if "cores" in row else str(row.get("device", ""))
    return ", ".join(part for part in (model, machine) if part)


def source(row: Row) -> str:
    """Where its figures are from."""
    commit = f" · commit {row['commit']}" if row.get("commit") else ""
    return f"benchmarks/results/{row['file']}{commit}"
