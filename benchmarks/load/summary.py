"""From records to figures: percentiles, goodput, cost. Plain arithmetic, no clock.

Latencies count from the time at which a request was due; `*_from_send_*` from when it left, which is kinder
to a stalled server. In a closed loop both are the same. Rates count what falls into the measured window.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from load.client import Record

Row = dict[str, object]
PERCENTILES = (50, 90, 99)
CURVE = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 100)  # enough to draw a distribution
UNITS_S = {"ms": 1e-3, "s": 1.0}


class Slo(NamedTuple):
    """What a request must keep, in seconds; None: anything. itl is its mean time between tokens."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def is_met(self, record: Record) -> bool:
        """A failed request meets none."""
        if record.error is not None:
            return False
        found = (ttft_s(record), mean_gap_s(record), record.end_s - record.scheduled_s)
        return all(
            limit is None or value is None or value <= limit for limit, value in zip(self, found, strict=True)
        )


def parse_slo(text: str) -> Slo:
    """ttft=500ms,itl=50ms,e2e=10s, any of them. Raises ValueError."""
    limits = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        number = value.rstrip("ms")
        try:
            limits[name] = float(number) * UNITS_S[value[len(number) :]]
        except (ValueError, KeyError):
            raise ValueError(
                f"an SLO must be like ttft=500ms,itl=50ms,e2e=10s, got {text}: correct it"
            ) from None
    if unknown := limits.keys() - set(Slo._fields):
        raise ValueError(f"an SLO must be of ttft, itl or e2e, got {', '.join(sorted(unknown))}: correct it")
    return Slo(**limits)


def ttft_s(record: Record) -> float:
    """From when it was due to its first text."""
    return record.event_s[0] - record.scheduled_s


def mean_gap_s(record: Record) -> float | None:
    """Between two tokens, after the first; None if there was one. Events may carry several tokens or none."""
    tokens = max(record.output_tokens, len(record.event_s))
    return (record.event_s[-1] - record.event_s[0]) / (tokens - 1) if tokens > 1 else None


def summarize(
    records: Sequence[Record], window_s: tuple[float, float], slo: Slo, price_per_hour: float | None = None
) -> Row:
    """Figures of the requests that were due in the window; tokens are those that came in it, whosever."""
    start_s, end_s = window_s
    length_s = end_s - start_s
    measured = [one for one in records if start_s <= one.scheduled_s < end_s]
    good = [one for one in measured if slo.is_met(one)]
    tokens = sum(_tokens_within(one, window_s) for one in records)
    row: Row = {
        "requests": len(measured),
        "completed": sum(one.error is None for one in measured),
        "failed": sum(one.error is not None for one in measured),
        "errors": dict(Counter(one.error for one in measured if one.error is not None)),
        "offered_req_per_s": _round(len(measured) / length_s),
        "completed_req_per_s": _round(
            sum(one.error is None and start_s <= one.end_s < end_s for one in records) / length_s
        ),
        "output_tok_per_s": _round(tokens / length_s),
        "prompt_tokens_mean": _mean(one.prompt_tokens for one in measured if one.error is None),
        "output_tokens_mean": _mean(one.output_tokens for one in measured if one.error is None),
        "cached_share": _share(measured),
        **latencies(measured),
        "goodput_req_per_s": _round(len(good) / length_s),
        "slo_met": _round(len(good) / len(measured)) if measured else None,
        "slo": {name: limit for name, limit in slo._asdict().items() if limit is not None},
    }
    if price_per_hour is not None:
        good_tokens = sum(one.output_tokens for one in good)
        row["usd_per_million_output_tokens"] = _cost(price_per_hour, tokens / length_s)
        row["usd_per_million_good_output_tokens"] = _cost(price_per_hour, good_tokens / length_s)
    kinds = sorted({one.kind for one in measured})
    if len(kinds) > 1:
        row["by_kind"] = {kind: latencies([one for one in measured if one.kind == kind]) for kind in kinds}
    return row


def latencies(records: Iterable[Record]) -> Row:
    """Milliseconds at p50, p90 and p99, of requests that ended well; and the whole curve of TTFT."""
    good = [one for one in records if one.error is None]
    values = {
        "ttft": [ttft_s(one) for one in good],
        "ttft_from_send": [one.event_s[0] - one.sent_s for one in good],
        "itl": [gap for one in good for gap in _gaps_s(one)],
        "tpot": [gap for one in good if (gap := mean_gap_s(one)) is not None],
        "e2e": [one.end_s - one.scheduled_s for one in good],
        "e2e_from_send": [one.end_s - one.sent_s for one in good],
    }
    row: Row = {}
    for name, times_s in values.items():
        if times_s:
            found = np.percentile(times_s, PERCENTILES) * 1000
            row |= {f"{name}_p{p}_ms": _round(float(ms)) for p, ms in zip(PERCENTILES, found, strict=True)}
    if good:
        curve = np.percentile(values["ttft"], CURVE) * 1000
        row["ttft_curve_ms"] = [[p, _round(float(ms))] for p, ms in zip(CURVE, curve, strict=True)]
    return row


def median_of(rows: Sequence[Row]) -> Row:
    """Median of every figure over rounds, and `spread` with its lowest and highest."""
    medians: Row = {}
    spread: Row = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) == len(rows):
            medians[name] = _round(statistics.median(numbers))
            spread[name] = [_round(min(numbers)), _round(max(numbers))]
        elif all(isinstance(value, dict) for value in values) and name == "by_kind":
            kinds = [dict(value) for value in values if isinstance(value, dict)]
            common = [kind for kind in kinds[0] if all(kind in one for one in kinds)]
            medians[name] = {kind: median_of([one[kind] for one in kinds]) for kind in common}
    return {**medians, "spread": spread}


def _gaps_s(record: Record) -> list[float]:
    return [after - before for before, after in itertools.pairwise(record.event_s)]


def _tokens_within(record: Record, window_s: tuple[float, float]) -> float:
    """An answer's tokens are spread evenly over its events."""
    if not record.event_s:
        return 0.0
    inside = sum(window_s[0] <= at_s < window_s[1] for at_s in record.event_s)
    return inside * (record.output_tokens or len(record.event_s)) / len(record.event_s)


def _share(records: Iterable[Record]) -> float | None:
    """Of prompt tokens that the server had cached."""
    prompts, cached = 0, 0
    for one in records:
        prompts, cached = prompts + one.prompt_tokens, cached + one.cached_tokens
    return _round(cached / prompts) if prompts else None


def _cost(price_per_hour: float, tok_per_s: float) -> float | None:
    return _round(price_per_hour / 3600 / tok_per_s * 1e6) if tok_per_s else None


def _mean(values: Iterable[int]) -> float | None:
    found = list(values)
    return _round(statistics.fmean(found)) if found else None


def _round(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
