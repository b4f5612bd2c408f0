"""LoRA adapters, if the server says that it has slots for them: names, gauge, routes that change them."""

import asyncio
import time

from cabochon.server.gateway.finding import OK, Finding, Result, judge, skip
from cabochon.server.gateway.http_client import Connection, ask, exchange
from cabochon.server.gateway.subject import (
    COMPLETIONS,
    MODELS,
    POLL_S,
    Subject,
    listed_models,
    read_metrics,
)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SEEN_S = 4.0
OFF = {401, 403, 404, 405}
BAD_BODY = {400, 422}


async def check_lora(subject: Subject) -> list[Finding]:
    """Nothing is loaded or unloaded. Raises HttpFailure."""
    return [await _adapter(subject), await _routes(subject)]


async def _adapter(subject: Subject) -> Finding:
    """The first listed adapter is asked, and must then be in the gauge."""
    limit = "in running_lora_adapters"
    models = listed_models((await ask(subject.target, "GET", MODELS)).json())
    adapter = next((entry["id"] for entry in models if entry.get("parent")), None)
    if adapter is None:
        return skip("lora.active", f"no model with a parent in {MODELS}", limit)
    body = {**subject.long_stream(), "model": adapter}
    async with exchange(subject.target, "POST", COMPLETIONS, body) as stream:
        is_seen = stream.status == OK and await _is_active(subject, adapter)
    seen = "is in the gauge" if is_seen else "is not in the gauge"
    return judge(
        "lora.active",
        is_seen,
        measured=f"{adapter} {seen}" if stream.status == OK else f"{adapter} answered {stream.status}",
        limit=limit,
        advice="name adapters by the `model` that requests use: lora-affinity-scorer compares the two",
    )


async def _is_active(subject: Subject, adapter: str) -> bool:
    async with Connection(subject.target) as scraper:
        deadline_s = time.monotonic() + SEEN_S
        while time.monotonic() < deadline_s:
            if adapter in (await read_metrics(scraper)).active_adapters:
                return True
            await asyncio.sleep(POLL_S)
    return False


async def _routes(subject: Subject) -> Finding:
    """An empty body is refused by a route that is on, and changes nothing."""
    limit = "both on, or both off"
    statuses = [(await ask(subject.target, "POST", path, {})).status for path in (LOAD, UNLOAD)]
    if set(statuses) <= OFF:
        return skip("lora.routes", "off: adapters stay as they are", limit)
    return judge(
        "lora.routes",
        set(statuses) <= BAD_BODY,
        measured=f"an empty body got {statuses[0]} and {statuses[1]}",
        limit=limit,
        advice=f"serve {LOAD} and {UNLOAD}, and refuse a body without lora_name with 400",
        otherwise=Result.FAIL,
    )
