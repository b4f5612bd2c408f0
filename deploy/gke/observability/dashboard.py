"""Writes dashboard.json, which Grafana reads: one line a panel here, forty there.

python deploy/gke/observability/dashboard.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

OUT = Path(__file__).with_name("dashboard.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WHERE = 'namespace="$namespace",model_name=~"$model",pod=~"$pod"'
WHOSE = 'namespace="$namespace",pod=~"$pod"'  # of series without a model
COLUMNS, HEIGHT = 24, 8
INFO = "vllm:cache_config_info"  # one series a pod, as long as its engine lives


class Panel(NamedTuple):
    """queries: PromQL by legend. unit: Grafana's. limits: value from which a colour is, worst last."""

    title: str
    unit: str
    queries: dict[str, str]
    says: str
    limits: tuple[float, ...] = ()
    is_stat: bool = False


def quantiles(metric: str, where: str = WHERE) -> dict[str, str]:
    """p50, p90 and p99 over all pods."""
    buckets = f"sum by (le) (rate({metric}_bucket{{{where}}}[$__rate_interval]))"
    return {f"p{q}": f"histogram_quantile({q / 100:g}, {buckets})" for q in (50, 90, 99)}


def rate(metric: str, by: str = "", where: str = WHERE, more: str = "") -> str:
    """Per second."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({metric}{{{where}{more}}}[$__rate_interval]))"


def gauge(metric: str, how: str = "sum", by: str = "", where: str = WHERE) -> str:
    """Of all pods together, or by a label."""
    return f"{how} by ({by}) ({metric}{{{where}}})" if by else f"{how}({metric}{{{where}}})"


def now() -> list[Panel]:
    """Is it well?"""
    ended = rate("vllm:request_success_total")
    errors = rate("vllm:request_success_total", more=',finished_reason="error"')
    slow = 'model:first_token_slow:ratio_rate1h{namespace="$namespace",model_name=~"$model"}'
    return [
        Panel(
            "Replicas with an engine",
            "short",
            {"replicas": gauge(INFO, "count")},
            "Pods whose /metrics answered; a dead engine has none.",
            is_stat=True,
        ),
        Panel(
            "Running",
            "short",
            {"running": gauge("vllm:num_requests_running")},
            "Requests in a batch.",
            is_stat=True,
        ),
        Panel(
            "Waiting",
            "short",
            {"waiting": gauge("vllm:num_requests_waiting")},
            "Requests that wait for a row, pages or an adapter's slot.",
            (5, 50),
            is_stat=True,
        ),
        Panel(
            "KV cache, fullest pod",
            "percentunit",
            {"used": gauge("vllm:kv_cache_usage_perc", "max")},
            "Pages of live requests; pages kept for prefix hits count as free.",
            (0.8, 0.95),
            is_stat=True,
        ),
        Panel(
            "Errors of ours",
            "percentunit",
            {"errors": f"{errors} / {ended}"},
            "Share of requests that ended with finish reason error.",
            (0.001, 0.01),
            is_stat=True,
        ),
        Panel(
            "First tokens within 2.5 s",
            "percentunit",
            {"within": f"1 - max({slow})"},
            "Over an hour; the objective is 99 %.",
            is_stat=True,
        ),
    ]


def traffic() -> list[Panel]:
    """What comes in and goes out."""
    return [
        Panel(
            "Requests ended, by reason",
            "reqps",
            {"{{finished_reason}}": rate("vllm:request_success_total", "finished_reason")},
            "stop and length are answers, abort is a client that left, error is our fault.",
        ),
        Panel(
            "Tokens",
            "suffix:tok/s",
            {"prompt": rate("vllm:prompt_tokens_total"), "generated": rate("vllm:generation_tokens_total")},
            "Prompt tokens include those that were found in the cache.",
        ),
        Panel(
            "Tokens generated, by pod",
            "suffix:tok/s",
            {"{{pod}}": rate("vllm:generation_tokens_total", "pod")},
            "Uneven pods: look at the picker.",
        ),
    ]


def latency() -> list[Panel]:
    """What users feel."""
    return [
        Panel(
            "Time to first token",
            "s",
            quantiles("vllm:time_to_first_token_seconds"),
            "From arrival; queue and prefill are in the next row.",
            (1, 2.5),
        ),
        Panel(
            "Time between tokens",
            "s",
            quantiles("vllm:inter_token_latency_seconds"),
            "Of every gap; tokens of one step share it.",
            (0.05, 0.1),
        ),
        Panel("Whole request", "s", quantiles("vllm:e2e_request_latency_seconds"), "Arrival to last token."),
        Panel(
            "Time per token of a request",
            "s",
            quantiles("vllm:request_time_per_output_token_seconds"),
            "Mean of a request after its first token.",
        ),
    ]


def queue_and_prefill() -> list[Panel]:
    """Where a first token's time went."""
    return [
        Panel(
            "Requests",
            "short",
            {"running": gauge("vllm:num_requests_running"), "waiting": gauge("vllm:num_requests_waiting")},
            "A queue behind a picker should be short: below five a pod.",
        ),
        Panel(
            "Waiting, by pod", "short", {"{{pod}}": gauge("vllm:num_requests_waiting", by="pod")}, "", (5, 50)
        ),
        Panel(
            "Time in the queue",
            "s",
            quantiles("vllm:request_queue_time_seconds"),
            "Arrival to first scheduled.",
        ),
        Panel(
            "Prefill", "s", quantiles("vllm:request_prefill_time_seconds"), "First scheduled to first token."
        ),
    ]


def kv_cache_and_prefixes() -> list[Panel]:
    """Memory of running requests, and what is found again."""
    hits, asked = rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total")
    shape = "num_gpu_blocks, block_size, cache_dtype"
    return [
        Panel(
            "KV cache used, by pod",
            "percentunit",
            {"{{pod}}": gauge("vllm:kv_cache_usage_perc", "max", "pod")},
            "Above 90 % requests wait for pages and are preempted.",
            (0.8, 0.95),
        ),
        Panel(
            "Prompt tokens found in the cache",
            "percentunit",
            {"hits": f"{hits} / {asked}"},
            "Share of prompt tokens looked up.",
        ),
        Panel(
            "Preemptions, by pod",
            "cpm",
            {"{{pod}}": "60 * " + rate("vllm:num_preemptions_total", "pod")},
            "Requests that gave up their pages and are computed again.",
            (1, 10),
        ),
        Panel(
            "Shape of the cache",
            "short",
            {
                "{{num_gpu_blocks}} pages of {{block_size}} tokens, {{cache_dtype}}": gauge(
                    INFO, "count", shape
                )
            },
            "Pods of each shape.",
        ),
    ]


def adapters() -> list[Panel]:
    """LoRA."""
    state = "running_lora_adapters, waiting_lora_adapters, max_lora"
    legend = "in slots: {{running_lora_adapters}}; waited for: {{waiting_lora_adapters}}; slots: {{max_lora}}"
    return [
        Panel(
            "Adapters in slots and waited for",
            "short",
            {legend: gauge("vllm:lora_requests_info", "count", state, WHOSE)},
            "Pods of each state. Empty without lora_dir and lora_modules.",
        ),
    ]


def guard() -> list[Panel]:
    """Model Armor; empty where it is off."""
    return [
        Panel(
            "Checks, by outcome",
            "reqps",
            {"{{stage}} {{outcome}}": rate("cabochon:guard_checks_total", "stage, outcome", WHOSE)},
            "Calls of Model Armor.",
        ),
        Panel(
            "Blocked, by filter",
            "reqps",
            {"{{stage}} {{filter}}": rate("cabochon:guard_blocked_total", "stage, filter", WHOSE)},
            "Prompts and answers.",
        ),
        Panel(
            "Unchecked, by reason",
            "reqps",
            {
                "{{reason}}, {{policy}}": rate("cabochon:guard_unchecked_total", "reason, policy", WHOSE),
                "released": rate("cabochon:guard_fail_open_total", where=WHOSE),
            },
            "Refused where the policy says closed, released where it says open.",
        ),
        Panel(
            "Time of a check",
            "s",
            quantiles("cabochon:guard_check_seconds", WHOSE),
            "One call, its retry included.",
        ),
        Panel(
            "Added to the first token",
            "s",
            quantiles("cabochon:guard_ttft_added_seconds", WHOSE),
            "What the verdict came later than the first token.",
        ),
        Panel(
            "Breaker and calls in flight",
            "short",
            {
                "breaker {{pod}}": gauge("cabochon:guard_breaker_state", "max", "pod", WHOSE),
                "in flight": gauge("cabochon:guard_inflight", where=WHOSE),
            },
            "Breaker: 0 is closed.",
            (1,),
        ),
    ]


def engine() -> list[Panel]:
    """Its steps."""
    return [
        Panel(
            "Scrapes answered",
            "bool_yes_no",
            {"{{pod}}": f"max by (pod) (up{{{WHOSE}}})"},
            "No: dead or hung, loading, or gone. Other exporters of the namespace are here too.",
        ),
        Panel(
            "Steps",
            "suffix:steps/s",
            {"{{pod}}": rate("vllm:iteration_tokens_total_count", "pod")},
            "None while requests run: the engine hangs.",
        ),
        Panel(
            "Tokens of a step",
            "short",
            quantiles("vllm:iteration_tokens_total"),
            "Up to step_tokens while prompts are computed, else a token for each running request.",
        ),
        Panel("Decode", "s", quantiles("vllm:request_decode_time_seconds"), "First to last token."),
        Panel(
            "Scheduled to last token",
            "s",
            quantiles("vllm:request_inference_time_seconds"),
            "Without the queue.",
        ),
    ]


ROWS: dict[str, Callable[[], list[Panel]]] = {
    "Now": now,
    "Traffic": traffic,
    "Latency": latency,
    "Queue and prefill": queue_and_prefill,
    "KV cache and prefixes": kv_cache_and_prefixes,
    "Adapters": adapters,
    "Guard": guard,
    "Engine": engine,
}


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
