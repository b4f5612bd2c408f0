"""What the guard counts, as a scrape shows it."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.verdicts import Verdict


def scraped(registry: CollectorRegistry) -> dict[str, float]:
    """Samples above 0 by name and labels."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        " ".join([sample.name.removeprefix("cabochon:guard_"), *sample.labels.values()]): sample.value
        for sample in samples
        if sample.value and not sample.name.endswith("_bucket")
    }


def test_verdicts_are_counted_with_what_they_mean() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics(registry)
    assert scraped(registry) == {}
    metrics.checked("prompt", Verdict(outcome="pass"), "closed")
    metrics.checked("prompt", Verdict(outcome="pass", filters=("sdp",)), "closed")
    metrics.checked("response", Verdict(outcome="block", filters=("csam", "rai:harassment")), "closed")
    metrics.checked("response", Verdict(outcome="rewrite", rewritten="x", filters=("sdp",)), "closed")
    metrics.checked("response", Verdict(outcome="unchecked", reason="timeout"), "open")
    assert scraped(registry) == {
        "checks_total pass prompt": 2,
        "inspected_total sdp prompt": 1,
        "checks_total block response": 1,
        "blocked_total csam response": 1,
        "blocked_total rai:harassment response": 1,
        "checks_total rewrite response": 1,
        "checks_total unchecked response": 1,
        "unchecked_total open timeout": 1,
    }


def test_times_and_sizes_are_counted() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics(registry)
    metrics.asked("prompt", 0.25, 100)
    metrics.rewrote("prompt")
    metrics.failed_open("response")
    metrics.held(0.5)
    metrics.delayed(0.125)
    metrics.answered(3)
    assert scraped(registry) == {
        "check_seconds_count prompt": 1,
        "check_seconds_sum prompt": 0.25,
        "scanned_chars_total prompt": 100,
        "rewrites_total prompt": 1,
        "fail_open_total response": 1,
        "hold_seconds_count": 1,
        "hold_seconds_sum": 0.5,
        "ttft_added_seconds_count": 1,
        "ttft_added_seconds_sum": 0.125,
        "windows_per_response_count": 1,
        "windows_per_response_sum": 3,
    }
    text = generate_latest(registry).decode()
    assert 'cabochon:guard_check_seconds_bucket{le="0.25",stage="prompt"} 1.0' in text
    assert "_created" not in text


def test_gauges_are_read_at_each_scrape() -> None:
    registry, values = CollectorRegistry(), {"inflight": 1.0, "quota_available": 2.5, "breaker_state": 2.0}
    GuardMetrics(registry).watch(
        lambda: values["inflight"], lambda: values["quota_available"], lambda: values["breaker_state"]
    )
    assert scraped(registry) == values
    values["inflight"] = 7.0
    assert scraped(registry) == values


def test_series_that_alerts_look_at_exist_from_the_start() -> None:
    registry = CollectorRegistry()
    GuardMetrics(registry)
    text = generate_latest(registry).decode()
    for line in (
        'cabochon:guard_fail_open_total{stage="prompt"} 0.0',
        'cabochon:guard_checks_total{outcome="unchecked",stage="response"} 0.0',
    ):
        assert line in text
