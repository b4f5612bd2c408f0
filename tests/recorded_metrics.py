"""Recorded series of /metrics, as Prometheus would have them from a pod, for promtool's unit tests of rules.

A scrape of the recording stands for one every 30 s: rates get smaller, shares and gauges do not.
"""

import gzip
import json
from itertools import groupby
from pathlib import Path

RECORDINGS = Path(__file__).parent / "deploy" / "recordings"
UP = "up"
INTERVAL_S = 30
TARGET = {"pod": "gemma-0", "instance": "gemma-0:8000", "namespace": "serving", "job": "cabochon"}
Series = dict[str, list[float | None]]


def recording(name: str) -> Series:
    """[scrapes] of every series, None where it was absent."""
    content = json.loads(gzip.decompress((RECORDINGS / f"{name}.json.gz").read_bytes()))
    series: Series = content["series"]
    return series


def after(*parts: Series) -> Series:
    """One after the other; counters go on, gauges begin anew."""
    joined: Series = {name: [] for name in parts[0]}
    for part in parts:
        length = len(part[UP])
        for name, values in joined.items():
            new = part.get(name, [None] * length)
            values += _raised(new, values) if _is_counter(name) else new
    return joined


def _is_counter(name: str) -> bool:
    return name.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum"))


def _raised(values: list[float | None], before: list[float | None]) -> list[float | None]:
    """Counters that begin where those before have ended."""
    last = next((value for value in reversed(before) if value is not None), 0.0)
    first = next((value for value in values if value is not None), 0.0)
    return [None if value is None else last + value - first for value in values]


def input_series(series: Series, **target: str) -> list[dict[str, str]]:
    """promtool's `input_series`, with the labels that a scraper adds; `target` changes them."""
    added = ",".join(f'{name}="{value}"' for name, value in (TARGET | target).items())
    return [
        {"series": _labelled(name, added), "values": " ".join(_compressed(values))}
        for name, values in series.items()
    ]


def _labelled(name: str, added: str) -> str:
    metric, _, own = name.partition("{")
    return f"{metric}{{{added},{own or '}'}"


def _compressed(values: list[float | None]) -> list[str]:
    """promtool's notation: `stale` ends a series, `_` is no sample, `3x4` is 3 and four more of it."""
    words: list[str] = []
    for value, run in groupby(values):
        length = len(list(run))
        if value is None:
            words += [*(["stale"] if words and words[-1] != "_" else ["_"]), *["_"] * (length - 1)]
        else:
            words.append(f"{value:.12g}x{length - 1}" if length > 1 else f"{value:.12g}")
    return words
