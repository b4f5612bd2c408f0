"""The dashboard asks for what the server has, in PromQL that Prometheus takes, and shows recorded series."""

import json
import re
import runpy
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from exposed_metrics import TARGET_LABELS, exposed, guard_labels, stem
from promtool import expect, grouping_labels, metric_names, selector_labels
from recorded_metrics import TARGET, Series, input_series, recording
from tools import ROOT, need_program

FOLDER = ROOT / "deploy" / "gke" / "observability"
ROWS = [
    "Now",
    "Traffic",
    "Latency",
    "Queue and prefill",
    "KV cache and prefixes",
    "Adapters",
    "Guard",
    "Engine",
]
CHOSEN = {"$namespace": TARGET["namespace"], "$model": "gemma", "$pod": ".*", "$__rate_interval": "5m"}


@cache
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def queries() -> list[tuple[str, str, str]]:
    """Title, legend and PromQL of all."""
    targets = [
        (panel["title"], target) for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]
    return [(title, target["legendFormat"], target["expr"]) for title, target in targets]


def recorded() -> set[str]:
    rules = yaml.safe_load((FOLDER / "rules.yaml").read_text())["spec"]["groups"]
    return {rule["record"] for group in rules for rule in group["rules"] if "record" in rule}


def test_the_file_is_what_its_program_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    made = runpy.run_path(str(FOLDER / "dashboard.py"))["dashboard"]()
    assert dashboard() == made, "run python deploy/gke/observability/dashboard.py"


def test_rows_are_there_and_no_panel_lies_on_another() -> None:
    panels = dashboard()["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == ROWS
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_name_is_exposed_or_recorded_and_nothing_exposed_is_left_out() -> None:
    used = set().union(*(metric_names(query) for _, _, query in queries()))
    assert used <= set(exposed()) | recorded()
    assert {stem(name) for name in exposed()} == {
        stem(name) for name in used if not name.startswith("model:")
    }


def test_every_label_is_one_that_the_metric_has() -> None:
    for title, legend, query in queries():
        for metric, label, value in selector_labels(query):
            own = exposed().get(metric, {"model_name": set()})
            assert label in set(own) | TARGET_LABELS, (title, metric, label)
            assert "$" in value or value in own[label], (title, metric, label, value)
        of_metrics = set().union(*(exposed().get(name, {}) for name in metric_names(query)))
        grouped = grouping_labels(query)
        assert grouped <= of_metrics | TARGET_LABELS, title
        assert set(re.findall(r"{{(\w+)}}", legend)) <= grouped, title


def test_variables_are_filled_from_what_the_server_has() -> None:
    listed = {one["name"]: one["query"] for one in dashboard()["templating"]["list"]}
    assert list(listed) == ["datasource", "namespace", "model", "pod"]
    for name, label in (("namespace", "namespace"), ("model", "model_name"), ("pod", "pod")):
        query = listed[name]["query"]
        assert query.endswith(f", {label})")
        assert metric_names(query) <= set(exposed())
    for _, _, query in queries():
        assert {f"${name}" for name in re.findall(r"\$(\w+)", query)} <= set(CHOSEN)


def guard_series() -> Series:
    """The guard's metrics with values of no meaning: only their form is shown."""
    labels = {
        "stage": "prompt",
        "outcome": "allowed",
        "filter": "csam",
        "reason": "quota",
        "policy": "closed",
        "le": "1.0",
    }
    names = {}
    for name, own in guard_labels().items():
        inside = ",".join(f'{label}="{labels[label]}"' for label in sorted(own))
        names[name] = f"{name}{{{inside}}}" if own else name
    return {name: [float(step) for step in range(150)] for name in names.values()}


def test_every_panel_shows_the_recorded_series(tmp_path: Path) -> None:
    """Each query becomes an alert that fires if it has any sample at all."""
    rules = yaml.safe_load((FOLDER / "rules.yaml").read_text())["spec"]["groups"]
    panels = []
    for index, (_, _, query) in enumerate(queries()):
        for name, value in CHOSEN.items():
            query = query.replace(name, value)
        panels.append({"record": f"panel:{index}", "expr": f"count({query})"})
    adapters = {name: one for name, one in recording("failing").items() if "lora" in name}
    series = recording("good") | adapters | guard_series()
    expression = (
        'count by (panel) (label_replace({__name__=~"panel:.*"}, "panel", "$1", "__name__", "panel:(.*)"))'
    )
    expected = {f'{{panel="{index}"}}': 1.0 for index in range(len(panels))}
    groups = [*rules, {"name": "panels", "rules": panels}]
    expect(tmp_path, groups, input_series(series), expression, {60: expected}, every="5m")


def test_the_config_map_has_the_dashboard() -> None:
    kubectl = need_program("kubectl")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, check=True)
    made = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    assert set(made) == {"ConfigMap", "Rules"}
    assert made["ConfigMap"]["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(made["ConfigMap"]["data"]["cabochon.json"]) == dashboard()
