"""Every alert on recorded series, by promtool: they fire when they should, none where all is well."""

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from exposed_metrics import TARGET_LABELS, exposed
from promtool import check_rules, expect, grouping_labels, metric_names, selector_labels
from recorded_metrics import Series, after, input_series, recording
from tools import ROOT, absent

RULES = ROOT / "deploy" / "gke" / "observability" / "rules.yaml"
CRDS = Path(os.environ.get("CABOCHON_CRDS", ROOT.parent / "shared" / "crds"))
FIRING = 'count by (alertname) (ALERTS{alertstate="firing"})'
LOOP = 75  # minutes of a recording: 150 scrapes, one for every half
KILLED = 70  # minute of `overloaded` in which its engine is killed
SLOW = {f"Cabochon{what}BudgetBurns{how}" for what in ("FirstToken", "InterToken") for how in ("", "Fast")}
OVERLOADED = SLOW | {"CabochonQueueGrows", "CabochonKVCacheFull", "CabochonPreemptions"}
DOWN = {"CabochonEngineDown"}
NOBODY = {"CabochonNobodyServes"}
FAILING = {"CabochonErrors"}
GUARD = {"CabochonGuardFailsOpen", "CabochonGuardBreakerOpen"}


@cache
def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["spec"]["groups"]
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"]]


def used(series: Series) -> Series:
    """Those that a rule may read: the others would only take time."""
    text = RULES.read_text()
    return {
        name: values
        for name, values in series.items()
        if name.partition("{")[0] in text
        and ("_bucket" not in name or any(f'le="{bound}"' in name for bound in ("2.5", "0.1")))
    }


def fires(folder: Path, series: list[dict[str, str]], alerts: dict[int, set[str]], every: str = "1m") -> None:
    """At each minute these alerts fire, and no others."""
    expected = {
        minute: {f'{{alertname="{name}"}}': 1.0 for name in names} for minute, names in alerts.items()
    }
    expect(folder, groups(), series, FIRING, expected, every)


def good() -> Series:
    return used(recording("good"))


def overloaded() -> Series:
    return used(recording("overloaded"))


def alive(series: Series) -> Series:
    """Until the engine is killed."""
    return {name: values[: 2 * KILLED] for name, values in series.items()}


def test_nothing_fires_in_three_days_of_a_server_that_is_well(tmp_path: Path) -> None:
    three_days = after(*[good()] * math.ceil(3 * 24 * 60 / LOOP))
    quiet: dict[int, set[str]] = {60: set(), 1500: set(), 4290: set()}
    fires(tmp_path, input_series(three_days), quiet, every="15m")


def test_overload_fires_and_then_the_end_of_the_engine(tmp_path: Path) -> None:
    fires(tmp_path, input_series(overloaded()), {2: set(), 69: OVERLOADED, 74: OVERLOADED | DOWN | NOBODY})


def test_one_of_two_replicas_that_dies_is_not_nobody(tmp_path: Path) -> None:
    dying = {name: values[2 * (LOOP - 15) :] for name, values in overloaded().items()}
    series = input_series(dying) + input_series(good(), pod="gemma-1", instance="gemma-1:8000")
    only_down = {"CabochonEngineDown"}
    expected = {f'{{alertname="{name}"}}': 1.0 for name in only_down}
    names = "|".join(DOWN | NOBODY)
    down = f'count by (alertname) (ALERTS{{alertstate="firing",alertname=~"{names}"}})'
    expect(tmp_path, groups(), series, down, {9: {}, 14: expected})


def test_a_day_with_slow_hours_is_a_ticket_and_no_page(tmp_path: Path) -> None:
    """Their windows of five and thirty minutes are over, what they cost the month is not."""
    day = after(*[good()] * 10, *[alive(overloaded())] * 4, *[good()] * 3)
    minutes = 10 * LOOP + 4 * KILLED + 3 * LOOP
    tickets = {name for name in SLOW if not name.endswith("Fast")}
    fires(tmp_path, input_series(day), {10 * LOOP: set(), minutes - 5: tickets}, every="5m")


def test_requests_that_fail_are_a_page(tmp_path: Path) -> None:
    fires(tmp_path, input_series(used(recording("failing"))), {60: FAILING})


@pytest.mark.parametrize(
    ("metric", "values", "alert"),
    [
        ("cabochon:guard_fail_open_total", [0.0] * 60 + [1.0] * 30, "CabochonGuardFailsOpen"),
        ("cabochon:guard_breaker_state", [0.0] * 60 + [2.0] * 30, "CabochonGuardBreakerOpen"),
    ],
)
def test_a_guard_that_gives_way_is_a_page(
    tmp_path: Path, metric: str, values: list[float | None], alert: str
) -> None:
    fires(tmp_path, input_series(good() | {metric: values}), {29: set(), 34: {alert}})


def test_every_alert_is_seen_to_fire_above() -> None:
    named = {rule["alert"] for rule in rules() if "alert" in rule}
    assert named == OVERLOADED | DOWN | NOBODY | FAILING | GUARD


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    check_rules(tmp_path, groups())


def test_every_name_is_exposed_or_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used_names = set().union(*(metric_names(rule["expr"]) for rule in rules()))
    assert used_names - set(exposed()) - recorded == set()
    assert recorded <= used_names, "recorded, and read by no alert"


def test_every_label_is_one_that_the_metric_has() -> None:
    for rule in rules():
        for metric, label, value in selector_labels(rule["expr"]):
            assert label in exposed()[metric], (metric, label)
            assert value in exposed()[metric][label], (metric, label, value)
        of_metrics = set().union(*(exposed().get(name, {}) for name in metric_names(rule["expr"])))
        is_of_records = any(name.startswith("model:") for name in metric_names(rule["expr"]))
        allowed = of_metrics | TARGET_LABELS | ({"model_name"} if is_of_records else set())
        assert grouping_labels(rule["expr"]) <= allowed, rule


def test_alerts_say_how_urgent_they_are_and_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert set(rule["annotations"]) == {"summary", "description"}


def test_the_resource_fits_its_definition(tmp_path: Path) -> None:
    checker, definition = CRDS / "crdcheck.py", "monitoring.googleapis.com_rules.yaml"
    if not checker.exists():
        absent(f"no schemas at {CRDS}: set CABOCHON_CRDS to the folder with crdcheck.py")
    (tmp_path / definition).symlink_to(CRDS / definition)  # the others take four seconds to load
    run = [sys.executable, str(checker), str(tmp_path), str(RULES)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Rules cabochon: ok" in done.stdout
