"""What /metrics has: names, labels and values from the server's own text, the guard's by name."""

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from fake_server import fake_service
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from cabochon.engine.fake import FAKE_INFO, FakeEngine

# What a scraper adds: PodMonitoring, and Managed Prometheus
TARGET_LABELS = {"pod", "instance", "job", "namespace", "cluster", "location", "project_id"}
GUARD = "cabochon.server.armor.guard_metrics"
GUARD_LABELS = {  # until that module is there
    "cabochon:guard_checks_total": {"stage", "outcome"},
    "cabochon:guard_blocked_total": {"stage", "filter"},
    "cabochon:guard_inspected_total": {"stage", "filter"},
    "cabochon:guard_rewrites_total": {"stage"},
    "cabochon:guard_unchecked_total": {"reason", "policy"},
    "cabochon:guard_fail_open_total": {"stage"},
    "cabochon:guard_scanned_chars_total": {"stage"},
    "cabochon:guard_check_seconds_bucket": {"stage", "le"},
    "cabochon:guard_hold_seconds_bucket": {"le"},
    "cabochon:guard_ttft_added_seconds_bucket": {"le"},
    "cabochon:guard_windows_per_response_bucket": {"le"},
    "cabochon:guard_breaker_state": set[str](),
    "cabochon:guard_inflight": set[str](),
    "cabochon:guard_quota_available": set[str](),
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
    guard: Labels = {name: {label: set() for label in labels} for name, labels in guard_labels().items()}
    return {**found, **guard, "up": {}}


@cache
def guard_labels() -> dict[str, set[str]]:
    """Labels of the guard's series by name, of a histogram its buckets; from its module where it is there."""
    if find_spec(GUARD) is None:
        return GUARD_LABELS
    registry = CollectorRegistry()
    metrics = import_module(GUARD).GuardMetrics(registry)
    metrics.watch(*[lambda: 0.0] * 3)
    suffixes = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    return {
        f"{one._name}{suffixes[one._type]}": {*one._labelnames, *(["le"] if one._type == "histogram" else [])}
        for one in registry._collector_to_names
        if isinstance(one, MetricWrapperBase)
    }


def stem(name: str) -> str:
    """Without what the format adds to counters and histograms."""
    return re.sub(r"_(total|bucket|sum|count)$", "", name)
