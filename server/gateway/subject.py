"""The server that is checked: where it is, which model is asked, and requests that last."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from cabochon.server.gateway.endpoint_metrics import EndpointMetrics, extract
from cabochon.server.gateway.exposition import FormatError, parse
from cabochon.server.gateway.finding import OK
from cabochon.server.gateway.http_client import Connection, HttpFailure, Target, ask

CHAT, COMPLETIONS, METRICS, HEALTH = "/v1/chat/completions", "/v1/completions", "/metrics", "/health"
MODELS = "/v1/models"
LONG_TOKENS = 512  # of a request that is to last
PROMPT_WORDS = 32
POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What all checks need."""

    target: Target
    model: str
    concurrency: int  # streams of the load
    seconds: float  # of the load
    long_tokens: int = LONG_TOKENS
    extra: dict[str, Any] = field(default_factory=dict)  # fields beyond OpenAI's that the server knows

    def completion(self, prompt: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """A body for /v1/completions."""
        return {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, **fields}

    def long_stream(self) -> dict[str, Any]:
        """A body for /v1/completions whose answer lasts; no cache has its prompt."""
        return self.completion(new_prompt(PROMPT_WORDS), self.long_tokens, stream=True, **self.extra)


def new_prompt(num_words: int) -> str:
    """A text whose prefix no server has seen."""
    return f"{uuid4().hex} " + "the quick brown fox " * (num_words // 4)


async def find_subject(target: Target, model: str | None, concurrency: int, seconds: float) -> Subject | str:
    """The server with its first model if none is named; what is wrong if it cannot be asked.

    Raises HttpFailure.
    """
    models = listed_models((await ask(target, "GET", MODELS)).json())
    base = [entry for entry in models if not entry.get("parent")]
    if model is None:
        if not base:
            return "no model in /v1/models"
        model = str(base[0]["id"])
    limits = [entry["max_model_len"] for entry in base if isinstance(entry.get("max_model_len"), int)]
    tokens = min([LONG_TOKENS, *(limit // 2 for limit in limits)])
    subject = Subject(
        target=target, model=model, concurrency=concurrency, seconds=seconds, long_tokens=tokens
    )
    wish = {"ignore_eos": True}  # vLLM's name; a server that refuses it may end its answers early
    body = subject.completion(new_prompt(4), 1, **wish)
    is_known = (await ask(target, "POST", COMPLETIONS, body)).status == OK
    return replace(subject, extra=wish) if is_known else subject


def listed_models(body: Any) -> list[dict[str, Any]]:
    """The entries of /v1/models that have an id."""
    data = body.get("data") if isinstance(body, dict) else None
    entries = data if isinstance(data, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


async def read_metrics(connection: Connection) -> EndpointMetrics:
    """One scrape, as the picker reads it. Raises HttpFailure if it would count as none."""
    answer = await connection.ask("GET", METRICS, with_key=False)
    if answer.status != OK:
        raise HttpFailure(f"/metrics answered {answer.status}")
    try:
        families = parse(answer.body.decode())
    except ValueError as error:  # FormatError and UnicodeDecodeError
        raise HttpFailure(str(error) if isinstance(error, FormatError) else "/metrics is not UTF-8") from None
    return extract(families, EndpointMetrics(), time.monotonic())[0]


async def wait_until(
    connection: Connection, is_so: Callable[[EndpointMetrics], bool], timeout_s: float
) -> float | None:
    """Seconds until the metrics are so; None if they were not in time. Raises HttpFailure."""
    start_s = time.monotonic()
    while time.monotonic() - start_s < timeout_s:
        if is_so(await read_metrics(connection)):
            return time.monotonic() - start_s
        await asyncio.sleep(POLL_S)
    return None


def is_idle(metrics: EndpointMetrics) -> bool:
    """Nothing runs."""
    return metrics.running == 0
