"""What /metrics has: names, labels and values from the server's own text, the guard's by name."""

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache

from fake_server import fake_service
from tools import ROOT

from cabochon.engine.fake import FAKE_INFO, FakeEngine

# What a scraper adds: PodMonitoring, and Managed Prometheus
TARGET_LABELS = {"pod", "instance", "job", "namespace", "cluster", "location", "project_id"}
GUARD = ROOT / "server" / "armor" / "guard_metrics.py"
GUARD_LABELS = {
    "cabochon:guard_checks_total": {"stage", "outcome"},
    "cabochon:guard_blocked_total": {"stage", "filter"},
    "cabochon:guard_unchecked_total": {"reason", "policy"},
    "cabochon:guard_fail_open_total": set[str](),
    "cabochon:guard_check_seconds_bucket": {"stage", "le"},
    "cabochon:guard_ttft_added_seconds_bucket": {"le"},
    "cabochon:guard_breaker_state": set[str](),
    "cabochon:guard_inflight": set[str](),
}
Labels = dict[str, dict[str, set[str]]]  # values by label, by name of the series


@cache
def exposed() -> Labels:
    """Of a server with adapters. The guard's labels have no values here."""
    _, text = fake_service(FakeEngine(replace(FAKE_INFO, max_loras=2))).scrape()
    found: Labels = defaultdict(lambda: defaultdict(set))
    for name, labels in re.findall(r"^([a-z0-9_:]+)\{(.*)\} \S+$", text.decode(), re.MULTILINE):
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            found[name][label].add(value)
    guard: Labels = {name: {label: set() for label in labels} for name, labels in GUARD_LABELS.items()}
    return {**found, **guard, "up": {}}


def guard_names() -> set[str] | None:
    """As its module writes them, without suffixes; None where there is no guard yet."""
    if not GUARD.exists():
        return None
    return set(map(stem, re.findall(r"cabochon:guard_\w+", GUARD.read_text())))


def stem(name: str) -> str:
    """Without what the format adds to counters and histograms."""
    return re.sub(r"_(total|bucket|sum|count)$", "", name)
