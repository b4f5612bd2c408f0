"""Where each GPU target stands, from the rows of a run: a value, or why there is none."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

Row = dict[str, object]
Found = tuple[float, str] | str  # value and what else to say, or why it was not measured


class Target(NamedTuple):
    """A share that must be reached. phase: where its rows come from."""

    what: str
    least: float
    phase: str
    find: Callable[[list[Row]], Found]


class Standing(NamedTuple):
    """Of one target."""

    what: str
    wanted: str
    measured: str
    verdict: str


def _matching(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _best(rows: list[Row], share: str, rate: str, unit: str) -> Found:
    """The row with the largest share; reasons of rows without one, if none has."""
    if measured := [row for row in rows if isinstance(row.get(share), float | int)]:
        best = max(measured, key=lambda row: float(str(row[share])))
        detail = f"{float(str(best[rate])):,.0f} {unit}, {best['variant']}" if "variant" in best else ""
        return float(str(best[share])), detail or f"{float(str(best[rate])):,.0f} {unit}"
    for row in rows:
        if reason := _reason(row):
            return reason
    return ""


def _reason(row: Row) -> str:
    if row.get("absent"):
        return f"absent: {row['absent']}" if row["absent"] is not True else "absent"
    return f"{row['error']}: {row.get('message')}" if row.get("error") else ""


def _decode(size: str, seqs: int) -> Callable[[list[Row]], Found]:
    def find(rows: list[Row]) -> Found:
        ours = [row for row in rows if str(row.get("case", "")).startswith(f"decode {size} S={seqs} ")]
        return _best(ours, "share_of_roofline", "tok_per_s", "tok/s")

    return find


def _prefill(rows: list[Row]) -> Found:
    ours = [row for row in rows if str(row.get("case", "")).startswith("prefill 9b 8 x 1024")]
    return _best(ours, "share_of_roofline", "tok_per_s", "tok/s")


def _decode_attention(seqs: int, keys: int) -> Callable[[list[Row]], Found]:
    def find(rows: list[Row]) -> Found:
        ours = _matching(rows, provider="ours", seqs=seqs, keys=keys, is_sliding=False)
        return _best(ours, "share_of_copy", "gb_per_s", "GB/s")

    return find


def _prefill_attention(rows: list[Row]) -> Found:
    """Of fa3-fwd's rate. Without it the share of the bf16 product is told, against which nothing is set."""
    shape = {"seqs": 1, "queries": 8192, "keys": 8192, "is_sliding": False}
    ours, theirs = (_matching(rows, provider=name, **shape) for name in ("ours", "fa3"))
    if not ours or "tflop_per_s" not in ours[0]:
        return _reason(ours[0]) if ours else ""
    rate, product = float(str(ours[0]["tflop_per_s"])), float(str(ours[0]["share_of_product"]))
    told = f"{rate:,.0f} TFLOP/s, {product:.1%} of the bf16 product"
    if theirs and "tflop_per_s" in theirs[0]:
        other = float(str(theirs[0]["tflop_per_s"]))
        return rate / other, f"{told}; fa3-fwd {other:,.0f}"
    return f"{told}; fa3-fwd {_reason(theirs[0]) if theirs else 'not measured'}"


DECODE, PREFILL = "kernel decode_attention", "kernel prefill_attention"
TARGETS = [
    Target("2B decode S=1 at 1k, share of roofline", 0.76, "decode 2b", _decode("2b", 1)),
    Target("2B decode S=256 at 1k, share of roofline", 0.70, "decode 2b", _decode("2b", 256)),
    Target("9B decode S=128 at 1k, share of roofline", 0.76, "decode 9b", _decode("9b", 128)),
    Target("9B prefill 8 x 1k, share of roofline", 0.64, "prefill 9b", _prefill),
    Target("decode attention S=256 at 1k, share of copy rate", 0.90, DECODE, _decode_attention(256, 1024)),
    Target("decode attention S=32 at 8k, share of copy rate", 0.90, DECODE, _decode_attention(32, 8192)),
    Target("prefill attention 1 x 8k, share of fa3-fwd", 0.80, PREFILL, _prefill_attention),
]


def standing(target: Target, rows: list[Row]) -> Standing:
    """Of a target, from all rows of one run."""
    own = [row for row in rows if row.get("phase") == target.phase]
    found = target.find(own)
    wanted = f">= {target.least:.0%}"
    if isinstance(found, str):
        ends = [row for row in own if "status" in row]
        ending = f"{ends[-1]['status']} {ends[-1].get('message') or ''}".strip() if ends else "did not run"
        ending = "no row of this shape" if ending == "ok" else ending
        return Standing(target.what, wanted, "not measured", found or f"phase `{target.phase}`: {ending}")
    value, detail = found
    verdict = "reached" if value >= target.least else "missed"
    return Standing(target.what, wanted, f"{value:.1%}", f"{verdict} ({detail})")


def table(rows: list[Row]) -> list[str]:
    """Lines to print: every target, whatever there is to say of it."""
    lines = [standing(target, rows) for target in TARGETS]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(line[:3], widths, strict=True)), line[3]])
        for line in lines
    ]
