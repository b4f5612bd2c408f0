"""What only the server knows: how long requests queued, from two scrapes of its histogram under vLLM's name.

The mean is exact. A percentile is known only to lie in a bucket: its upper limit is reported, as `below`.
"""

from typing import NamedTuple

from cabochon.server.gateway.exposition import FormatError, parse
from cabochon.server.gateway.http_client import HttpFailure, Target, ask

QUEUE = "vllm:request_queue_time_seconds"


class Queued(NamedTuple):
    """A histogram since the server's start: sum of all observations, and how many up to each limit."""

    sum_s: float
    counts: dict[float, float]


async def scrape_queue(target: Target) -> Queued | None:
    """None if the server has no such histogram, or its metrics are elsewhere."""
    try:
        answer = await ask(target, "GET", "/metrics")
        return parse_queue(answer.body.decode()) if answer.status == 200 else None
    except (HttpFailure, FormatError, UnicodeDecodeError):
        return None


def parse_queue(text: str) -> Queued | None:
    """Of all models of the server together. Raises FormatError."""
    families = parse(text)
    counts: dict[float, float] = {}
    others = 0.0  # the samples _sum and _count, whose names the parser drops
    for sample in families[QUEUE].samples if QUEUE in families else ():
        if limit := sample.labels().get("le"):
            counts[float(limit)] = counts.get(float(limit), 0.0) + sample.value
        else:
            others += sample.value
    return Queued(others - counts[float("inf")], counts) if counts else None


def queue_figures(before: Queued | None, after: Queued | None) -> dict[str, float]:
    """Milliseconds, of what was observed in between; nothing if there was nothing."""
    if before is None or after is None:
        return {}
    counts = {limit: after.counts[limit] - before.counts.get(limit, 0.0) for limit in sorted(after.counts)}
    total = counts[float("inf")]
    if total == 0:
        return {}
    found = {"queue_mean_ms": round((after.sum_s - before.sum_s) / total * 1000, 2)}
    for percent in (50, 90, 99):
        limit = next(limit for limit, count in counts.items() if count >= total * percent / 100)
        if limit < float("inf"):
            found[f"queue_p{percent}_below_ms"] = round(limit * 1000, 2)
    return found
