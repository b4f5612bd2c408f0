"""promtool, which evaluates PromQL on series that a test gives it: Prometheus' own engine, no server."""

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml
from recorded_metrics import INTERVAL_S
from tools import ROOT, need_program

INSTALLED = ROOT / ".promtool" / "promtool"  # by `make system-packages`


def check_rules(folder: Path, groups: list[dict[str, Any]]) -> None:
    """Fails if promtool does not take the groups."""
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": groups}))
    _run("check", "rules", "--lint-fatal", str(path))


def expect(
    folder: Path,
    groups: list[dict[str, Any]],
    series: list[dict[str, str]],
    expression: str,
    expected: dict[int, dict[str, float]],
    every: str = "1m",
) -> None:
    """Evaluate `groups` on `series`; `expression` must then have these samples at each minute, and no others.

    series: from `recorded_metrics.input_series`. expected: by minute, value by labels as in {a="b"}.
    """
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    samples = {
        minute: [{"labels": labels, "value": value} for labels, value in one.items()]
        for minute, one in expected.items()
    }
    test = {
        "interval": f"{INTERVAL_S}s",
        "input_series": series,
        "promql_expr_test": [
            {"expr": expression, "eval_time": f"{minute}m", "exp_samples": one}
            for minute, one in samples.items()
        ],
    }
    content = {"rule_files": ["rules.yaml"], "evaluation_interval": every, "tests": [test]}
    (folder / "tests.yaml").write_text(yaml.safe_dump(content))
    _run("test", "rules", str(folder / "tests.yaml"))


def _run(*arguments: str) -> None:
    tool = need_program("promtool", str(INSTALLED))
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def metric_names(expression: str) -> set[str]:
    """Of the series that a query reads."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\b(?:vllm|cabochon|model):[\w:]+|\bup\b", bare))


def selector_labels(expression: str) -> set[tuple[str, str, str]]:
    """(metric, label, value) of every matcher in braces; the value as written."""
    found = set()
    for metric, inside in re.findall(r"((?:vllm|cabochon|model):[\w:]+|\bup)\{([^}]*)\}", expression):
        for label, _, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', inside):
            found.add((metric, label, value))
    return found


def grouping_labels(expression: str) -> set[str]:
    """Labels after by, on and group_left."""
    lists = re.findall(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)", expression)
    return {label.strip() for one in lists for label in one.split(",") if label.strip()}
