"""Metrics of the guard: what was checked, what came of it, and what it cost. No text, no key, no template."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from cabochon.server.armor.verdicts import Stage, Verdict

disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client's

CHECK_S = (0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1, 2)
HOLD_S = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 30)
ADDED_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1, 2)
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
STAGES: tuple[Stage, ...] = ("prompt", "response")
OUTCOMES = ("pass", "rewrite", "block", "unchecked")


class GuardMetrics:
    """In the registry of the server's other metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cabochon:guard_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"cabochon:guard_{name}", text, labels, registry=registry, buckets=bounds)

        self._registry = registry
        self._checks = counter("checks", "Texts checked, those with a kept verdict too", "stage", "outcome")
        self._blocked = counter("blocked", "Matches that blocked, RAI by type", "stage", "filter")
        self._inspected = counter("inspected", "Matches of templates that only inspect", "stage", "filter")
        self._rewrites = counter("rewrites", "De-identified texts that were used", "stage")
        self._unchecked = counter("unchecked", "Texts that could not be checked", "reason", "policy")
        self._fail_open = counter("fail_open", "Texts that passed unchecked, as their policy says", "stage")
        self._seconds = histogram("check_seconds", "A check that asked Model Armor", CHECK_S, "stage")
        self._hold = histogram("hold_seconds", "Text generated to released", HOLD_S)
        self._added = histogram("ttft_added_seconds", "First token ready to verdict on the prompt", ADDED_S)
        self._windows = histogram("windows_per_response", "Checks of one answer", WINDOWS)
        self._scanned = counter("scanned_chars", "Characters sent to Model Armor", "stage")
        for stage in STAGES:  # they exist before the first event, so that rates see it
            self._fail_open.labels(stage)
            self._rewrites.labels(stage)
            for outcome in OUTCOMES:
                self._checks.labels(stage, outcome)

    def watch(
        self, inflight: Callable[[], float], quota: Callable[[], float], breaker: Callable[[], float]
    ) -> None:
        """Gauges, read at each scrape. breaker: 0 closed, 1 half open, 2 open, the worst of all endpoints."""
        for name, text, value in (
            ("inflight", "Calls of Model Armor under way", inflight),
            ("quota_available", "Calls that this replica may make at once", quota),
            ("breaker_state", "0 closed, 1 half open, 2 open", breaker),
        ):
            Gauge(f"cabochon:guard_{name}", text, registry=self._registry).set_function(value)

    def checked(self, stage: Stage, verdict: Verdict, policy: str) -> None:
        """Each verdict, kept or new. policy: what happens to the unchecked, closed or open."""
        self._checks.labels(stage, verdict.outcome).inc()
        if verdict.outcome == "unchecked":
            self._unchecked.labels(verdict.reason, policy).inc()
        matches = {"block": self._blocked, "pass": self._inspected}.get(verdict.outcome)
        if matches is not None:
            for name in verdict.filters:
                matches.labels(stage, name).inc()

    def asked(self, stage: Stage, seconds: float, num_chars: int) -> None:
        """Each check that asked the service, with its retry."""
        self._seconds.labels(stage).observe(seconds)
        self._scanned.labels(stage).inc(num_chars)

    def rewrote(self, stage: Stage) -> None:
        """A de-identified text took the place of the original."""
        self._rewrites.labels(stage).inc()

    def failed_open(self, stage: Stage) -> None:
        """An unchecked text went on, since its policy says so: alert on it."""
        self._fail_open.labels(stage).inc()

    def held(self, seconds: float) -> None:
        """A piece of an answer, from generated to released."""
        self._hold.observe(seconds)

    def delayed(self, seconds: float) -> None:
        """What the verdict on the prompt added to the time to first token; 0 if it was there before."""
        self._added.observe(seconds)

    def answered(self, num_windows: int) -> None:
        """An answer's end, and how many checks it took."""
        self._windows.observe(num_windows)
