"""/metrics at rest: what the picker's parser takes, and what its extractor makes of it."""

import re
from collections.abc import Iterable, Mapping

from cabochon.server.gateway.endpoint_metrics import (
    CACHE_INFO,
    KV_USAGE,
    LORA_INFO,
    RUNNING,
    WAITING,
    EndpointMetrics,
    extract,
)
from cabochon.server.gateway.exposition import Family, FormatError, parse
from cabochon.server.gateway.finding import OK, Finding, Result, judge, skip
from cabochon.server.gateway.http_client import Answer, Target, ask
from cabochon.server.gateway.subject import METRICS

Families = Mapping[str, Family]
VALUES = (WAITING, RUNNING, KV_USAGE)
EARLIEST_S = 1e9  # a time since 1970 in seconds is larger; 1 is not


async def check_metrics(target: Target) -> list[Finding]:
    """Scrape once, without a key. Raises HttpFailure."""
    return judge_metrics(await ask(target, "GET", METRICS, with_key=False))


def judge_metrics(answer: Answer) -> list[Finding]:
    """All rules that one scrape shows; those that need a text that parses are left out without one."""
    kind = answer.headers.get("content-type", "none")
    findings = [
        judge(
            "metrics.answer",
            answer.status == OK,
            measured=str(answer.status),
            limit="200 without a key",
            advice="serve /metrics to everybody: the picker sends no key, and skips any other status",
        ),
        judge(
            "metrics.type",
            kind.startswith("text/plain") and "version=0.0.4" in kind,
            measured=kind,
            limit="text/plain; version=0.0.4",
            advice="send Prometheus' text format without negotiation: the picker sends no Accept header",
            otherwise=Result.WARN,
        ),
    ]
    if answer.status != OK:
        return findings
    try:
        families = parse(answer.body.decode())
    except ValueError as error:
        what = str(error) if isinstance(error, FormatError) else "not UTF-8"
        return [*findings, _format(what)]
    return [
        *findings,
        _format(None),
        _types(families),
        _series(families),
        _values(families),
        _reads(families),
        _lora(families),
    ]


def _format(problem: str | None) -> Finding:
    return judge(
        "metrics.format",
        problem is None,
        measured=problem or "parses",
        limit="text format 0.0.4, legacy names",
        advice="mend that line: one bad line loses the whole scrape",
    )


def _types(families: Families) -> Finding:
    wrong = [
        name
        for name in (*VALUES, LORA_INFO)
        if name in families and families[name].kind not in ("gauge", "counter")
    ]
    return judge(
        "metrics.gauges",
        not wrong,
        measured=_list(f"{name} is {families[name].kind}" for name in wrong) or "all gauges",
        limit="# TYPE NAME gauge",
        advice="write a TYPE line before the samples: without it the picker reads 0",
    )


def _series(families: Families) -> Finding:
    counts = {name: len(families[name].samples) for name in (*VALUES, CACHE_INFO) if name in families}
    many = {name: count for name, count in counts.items() if count > 1}
    return judge(
        "metrics.series",
        not many,
        measured=_list(f"{count} of {name}" for name, count in many.items()) or "one each",
        limit="one series a gauge",
        advice="leave out labels per worker or engine: the picker takes the first series alone",
    )


def _values(families: Families) -> Finding:
    seen = {name: families[name].samples[0].value for name in VALUES if name in families}
    wrong = {
        name: value
        for name, value in seen.items()
        if not (0 <= value <= 1 if name == KV_USAGE else value >= 0 and value.is_integer())
    }
    return judge(
        "metrics.values",
        not wrong,
        measured=_list(f"{name} {value:g}" for name, value in (wrong or seen).items()) or "none there",
        limit="counts ≥ 0, KV 0..1",
        advice="give the KV cache as a fraction and queues as whole numbers: scores are 1 − x and x / 5",
    )


def _reads(families: Families) -> Finding:
    metrics, errors = extract(families, EndpointMetrics(), 0.0)
    if not errors and not (metrics.page_tokens > 0 and metrics.num_pages > 0):
        errors.append(f"{CACHE_INFO} must have block_size and num_gpu_blocks above 0, it has not")
    return judge(
        "picker.reads",
        not errors,
        measured=_list(errors) or f"{metrics.num_pages} pages of {metrics.page_tokens} tokens",
        limit="every family and label",
        advice="use vLLM's names, or name yours in the picker's engineConfigs: it keeps 0 for what it misses",
    )


def _lora(families: Families) -> Finding:
    limit = "one series, value a time, max_lora"
    if LORA_INFO not in families:
        return skip("metrics.lora", f"no {LORA_INFO}", limit)
    samples = families[LORA_INFO].samples
    newest = max(samples, key=lambda sample: sample.value)
    max_lora = newest.labels().get("max_lora", "")
    problems = []
    if not max_lora.isdecimal():
        problems.append("max_lora is no integer")
    if not newest.value >= EARLIEST_S:
        problems.append("the value is no time")
    if len(samples) > 1:
        problems.append(f"{len(samples)} series")
    return judge(
        "metrics.lora",
        not problems,
        measured=_list(problems) or f"max_lora {max_lora}",
        limit=limit,
        advice="write one series with the time as its value and drop old label sets: the largest value wins",
    )


def _list(parts: Iterable[str]) -> str:
    """Without what all names share."""
    return re.sub(r"vllm:(num_requests_)?", "", ", ".join(parts))
