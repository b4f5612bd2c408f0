"""What the dashboard shows: rows from what users feel to what causes it, and PromQL to fill them."""

from collections.abc import Callable
from typing import NamedTuple

WHERE = 'namespace="$namespace",model_name=~"$model",pod=~"$pod"'
WHOSE = 'namespace="$namespace",pod=~"$pod"'  # of series without a model
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
            "Above 85 % on average requests wait for pages and are preempted.",
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
        Panel("Held back", "s", quantiles("cabochon:guard_hold_seconds", WHOSE), "Generated to released."),
        Panel(
            "Checks of an answer",
            "short",
            quantiles("cabochon:guard_windows_per_response", WHOSE),
            "Windows; each is a call.",
        ),
        Panel(
            "Rewritten, or a match of a template that only inspects",
            "reqps",
            {
                "rewritten {{stage}}": rate("cabochon:guard_rewrites_total", "stage", WHOSE),
                "inspected {{stage}} {{filter}}": rate(
                    "cabochon:guard_inspected_total", "stage, filter", WHOSE
                ),
            },
            "Neither is blocked.",
        ),
        Panel(
            "Characters sent to Model Armor",
            "suffix:char/s",
            {"{{stage}}": rate("cabochon:guard_scanned_chars_total", "stage", WHOSE)},
            "What it costs.",
        ),
        Panel(
            "Breaker and calls in flight",
            "short",
            {
                "breaker {{pod}}": gauge("cabochon:guard_breaker_state", "max", "pod", WHOSE),
                "in flight": gauge("cabochon:guard_inflight", where=WHOSE),
                "left of the quota {{pod}}": gauge("cabochon:guard_quota_available", "min", "pod", WHOSE),
            },
            "Breaker: 0 closed, 1 half open, 2 open.",
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
