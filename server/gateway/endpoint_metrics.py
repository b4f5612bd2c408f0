"""What the endpoint picker knows of a model server: vLLM's metrics, by the rules of its core extractor.

Source: llm-d-router, pkg/epp/framework/plugins/datalayer/extractor/metrics (extractor, spec, loraspec).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cabochon.server.gateway.exposition import Family, Sample

WAITING = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
KV_USAGE = "vllm:kv_cache_usage_perc"
CACHE_INFO = "vllm:cache_config_info"
LORA_INFO = "vllm:lora_requests_info"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointMetrics:
    """The last values that were read; a family that is missing leaves its values as they were."""

    waiting: int = 0  # requests
    running: int = 0  # requests
    kv_usage: float = 0.0  # 0 to 1
    page_tokens: int = 0  # tokens of a page; 0: unknown
    num_pages: int = 0
    active_adapters: frozenset[str] = frozenset()
    waiting_adapters: frozenset[str] = frozenset()
    max_adapters: int = 0
    updated_s: float | None = None  # time.monotonic(); None: never


def extract(
    families: Mapping[str, Family], before: EndpointMetrics, now_s: float
) -> tuple[EndpointMetrics, list[str]]:
    """Values after a scrape, and what was missing or no number. One good family makes all of them fresh."""
    found: dict[str, Any] = {}
    errors: list[str] = []
    for field, name in (("waiting", WAITING), ("running", RUNNING), ("kv_usage", KV_USAGE)):
        if sample := _latest(families, name, errors):
            value = _value(families[name], sample)
            found[field] = value if field == "kv_usage" else int(value)
    if lora := _newest_lora(families):
        found |= _lora(lora.labels(), errors)
        found.setdefault("max_adapters", before.max_adapters)
    if info := _latest(families, CACHE_INFO, errors):
        labels = info.labels()
        found["page_tokens"] = _whole(labels, "block_size", errors) or 0
        found["num_pages"] = _whole(labels, "num_gpu_blocks", errors) or before.num_pages
    if found:
        found["updated_s"] = now_s
    return replace(before, **found), errors


def _latest(families: Mapping[str, Family], name: str, errors: list[str]) -> Sample | None:
    """The sample with the largest timestamp; the first one if they have none."""
    if name not in families:
        errors.append(f"metric family {name} must be there, it is not")
        return None
    return max(families[name].samples, key=lambda sample: sample.timestamp_ms)


def _value(family: Family, sample: Sample) -> float:
    """Only gauges and counters have a value; all others read as 0."""
    return sample.value if family.kind in ("gauge", "counter") else 0.0


def _newest_lora(families: Mapping[str, Family]) -> Sample | None:
    """The series with the largest value, which is its time of creation. Its absence is no error."""
    if LORA_INFO not in families:
        return None
    family = families[LORA_INFO]
    newest = max(family.samples, key=lambda sample: _value(family, sample))
    return newest if _value(family, newest) > -1 else None


def _lora(labels: dict[str, str], errors: list[str]) -> dict[str, object]:
    found: dict[str, object] = {
        "active_adapters": _names(labels.get("running_lora_adapters", "")),
        "waiting_adapters": _names(labels.get("waiting_lora_adapters", "")),
    }
    if (max_adapters := _whole(labels, "max_lora", errors)) is not None:
        found["max_adapters"] = max_adapters
    return found


def _names(listed: str) -> frozenset[str]:
    return frozenset(name.strip() for name in listed.split(",") if name.strip())


def _whole(labels: dict[str, str], name: str, errors: list[str]) -> int | None:
    """The label as an integer; None if it is absent, empty or none."""
    text = labels.get(name, "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        errors.append(f"label {name} must be an integer, it is not")
        return None
