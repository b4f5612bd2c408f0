"""Writes dashboard.json, which Grafana reads: a line or two a panel in rows.py, forty there.

python deploy/gke/observability/dashboard.py
"""

import json
from pathlib import Path
from typing import Any

from rows import INFO, ROWS, Panel

OUT = Path(__file__).with_name("dashboard.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 8


def panel(number: int, one: Panel, x: int, y: int, width: int) -> dict[str, Any]:
    """Grafana's object."""
    steps = [{"color": "green", "value": None}]
    steps += [{"color": c, "value": v} for c, v in zip(("orange", "red"), one.limits, strict=False)]
    defaults: dict[str, Any] = {
        "unit": one.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "background"}
    if not one.is_stat:
        style = "dashed" if one.limits else "off"
        defaults["custom"] = {"fillOpacity": 8, "showPoints": "never", "thresholdsStyle": {"mode": style}}
        options = {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": number,
        "type": "stat" if one.is_stat else "timeseries",
        "title": one.title,
        "description": one.says,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT // 2 if one.is_stat else HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(one.queries.items())
        ],
    }


def panels() -> list[dict[str, Any]]:
    """Rows one below the other, panels of a row side by side, at most four."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, make in ROWS.items():
        row = make()
        at = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        made.append(
            {
                "id": len(made) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": at,
                "panels": [],
            }
        )
        per_line = len(row) if row[0].is_stat else min(4, len(row))
        width, height = COLUMNS // per_line, HEIGHT // 2 if row[0].is_stat else HEIGHT
        for index, one in enumerate(row):
            line, column = divmod(index, per_line)
            made.append(panel(len(made) + 1, one, column * width, y + 1 + line * height, width))
        y += 1 + -(-len(row) // per_line) * height
    return made


def variable(name: str, query: str, *, has_all: bool) -> dict[str, Any]:
    """Filled from the series that the server has."""
    options: dict[str, Any] = {"includeAll": True, "allValue": ".*", "multi": True} if has_all else {}
    asked = {"query": query, "refId": name}
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": asked,
        "refresh": 2,
        "sort": 1,
        **options,
    }


def dashboard() -> dict[str, Any]:
    """The whole document."""
    own = f'{INFO}{{namespace="$namespace"'
    return {
        "uid": "cabochon",
        "title": "Cabochon",
        "tags": ["cabochon", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                variable("namespace", f"label_values({INFO}, namespace)", has_all=False),
                variable("model", f"label_values({own}}}, model_name)", has_all=True),
                variable("pod", f'label_values({own},model_name=~"$model"}}, pod)', has_all=True),
            ]
        },
        "panels": panels(),
    }


def main() -> None:
    OUT.write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
