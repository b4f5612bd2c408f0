"""Answers as the picker reads them: events, usage, the name of the model, models that are not there."""

import json
from collections.abc import Sequence
from typing import Any

from cabochon.server.gateway.finding import OK, Finding, Result, judge
from cabochon.server.gateway.http_client import Answer, ask, exchange
from cabochon.server.gateway.openai_request import read_usage
from cabochon.server.gateway.subject import CHAT, COMPLETIONS, MODELS, Subject, listed_models, new_prompt

NOBODY = "no-such-model-of-gateway-check"
ANSWER_TOKENS = 16
PREFIX_PAGES = 4
UNKNOWN_PAGE_TOKENS = 32
MAX_PREFIX_WORDS = 512
NOT_FOUND = 404
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


async def check_models(subject: Subject) -> list[Finding]:
    """Is the model listed, and is another one refused? Raises HttpFailure."""
    listed = [model["id"] for model in listed_models((await ask(subject.target, "GET", MODELS)).json())]
    other = {**subject.completion("a", 1), "model": NOBODY}
    refused = await ask(subject.target, "POST", COMPLETIONS, other)
    return [
        judge(
            "model.listed",
            subject.model in listed,
            measured=f"{subject.model} is {'' if subject.model in listed else 'not '}listed",
            limit=MODELS,
            advice="list every name that requests may use: any replica may be asked for the list",
        ),
        judge(
            "model.unknown",
            refused.status == NOT_FOUND,
            measured=str(refused.status),
            limit="404",
            advice="refuse models and adapters that are not there: the picker does not know which you have",
        ),
    ]


async def check_answers(subject: Subject) -> list[Finding]:
    """A chat as a stream, a completion as a whole. Raises HttpFailure."""
    chat = {
        "model": subject.model,
        "messages": [{"role": "user", "content": "Count from one to twenty."}],
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with exchange(subject.target, "POST", CHAT, chat) as answer:
        stream = await answer.whole()
    whole = await ask(subject.target, "POST", COMPLETIONS, subject.completion("One, two,", ANSWER_TOKENS))
    findings = [
        judge(
            "answer.status",
            stream.status == whole.status == OK,
            measured=f"chat {stream.status}, completion {whole.status}",
            limit="200",
            advice=f"serve {CHAT} and {COMPLETIONS}: the protocol of model servers asks for both",
        )
    ]
    if stream.status == OK:
        findings += judge_stream(stream)
    if stream.status == whole.status == OK:
        findings.append(judge_echo(subject.model, [*_events(stream.body), whole.body]))
    return findings


def judge_stream(answer: Answer) -> list[Finding]:
    """Framing, end and usage of a stream that was asked for its usage."""
    kind = answer.headers.get("content-type", "none")
    lines = [line for line in answer.body.split(b"\n") if line]
    torn = sum(not piece.endswith(b"\n\n") for piece in answer.pieces)
    odd = sum(not line.startswith((b"data: ", b":")) for line in lines)  # a colon begins a comment
    not_json = sum(_parsed(data) is None for data in _events(answer.body))
    problems = {"pieces without a whole event": torn, "lines without `data: `": odd, "not JSON": not_json}
    found = [f"{count} {what}" for what, count in problems.items() if count]
    return [
        judge(
            "stream.type",
            kind.startswith("text/event-stream"),
            measured=kind,
            limit="text/event-stream",
            advice="set this Content-Type: by it the picker knows a stream",
        ),
        judge(
            "stream.framing",
            not found and bool(answer.pieces),
            measured=", ".join(found) or f"{len(_events(answer.body))} events in {len(answer.pieces)} pieces",
            limit="whole `data: ` events per chunk",
            advice="write each event with its two line feeds in one go: usage in a torn event is not read",
        ),
        judge(
            "stream.done",
            bool(lines) and lines[-1].strip() == b"data: [DONE]",
            measured="[DONE]" if lines and lines[-1].strip() == b"data: [DONE]" else "another last line",
            limit="data: [DONE] last",
            advice="end every stream with it: clients wait for it",
        ),
        *_usage(answer.pieces),
    ]


def judge_echo(model: str, texts: Sequence[bytes]) -> Finding:
    """The picker replaces these very bytes by the name that the client used."""
    name = json.dumps(model, ensure_ascii=False)
    forms = [f'"model":{name}'.encode(), f'"model": {name}'.encode()]
    silent = sum(not any(form in text for form in forms) for text in texts)
    return judge(
        "model.echo",
        silent == 0,
        measured=f"{silent} of {len(texts)} objects without it" if silent else f"in all {len(texts)} objects",
        limit='"model":"NAME" as asked',
        advice="echo the requested name in every object, in plain JSON: rewrites of models depend on it",
    )


async def check_prefix(subject: Subject, page_tokens: int) -> list[Finding]:
    """The same prompt twice: the picker sends it where it went before, for its cache. Raises HttpFailure."""
    num_words = PREFIX_PAGES * (page_tokens or UNKNOWN_PAGE_TOKENS)  # a word is a token or more
    body = subject.completion(new_prompt(min(MAX_PREFIX_WORDS, num_words, subject.long_tokens // 2)), 1)
    for _ in range(2):
        answer = await ask(subject.target, "POST", COMPLETIONS, body)
    usage = (_parsed(answer.body) or {}).get("usage")
    cached = _cached(usage) or 0
    prompt = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return [
        judge(
            "prefix.cached",
            cached > 0,
            measured=f"{cached} of {prompt} tokens" if answer.status == OK else f"answered {answer.status}",
            limit="> 0 the second time",
            advice="turn prefix caching on, or prefix-cache-scorer off: it gathers prompts for nothing",
            otherwise=Result.WARN,
        )
    ]


def _usage(pieces: Sequence[bytes]) -> list[Finding]:
    usage = next((found for piece in reversed(pieces) if (found := read_usage(piece))), None)
    is_whole = usage is not None and all(isinstance(usage.get(name), int) for name in COUNTS)
    cached = _cached(usage)
    return [
        judge(
            "stream.usage",
            is_whole,
            measured=f"{usage.get('total_tokens')} tokens" if usage else "none in one piece",
            limit="three counts in one chunk",
            advice="with stream_options.include_usage write usage at the top of one event, in one chunk",
        ),
        judge(
            "stream.cached",
            cached is not None,
            measured="no cached_tokens" if cached is None else f"{cached} cached",
            limit="prompt_tokens_details",
            advice="add usage.prompt_tokens_details.cached_tokens: the picker records it",
            otherwise=Result.WARN,
        ),
    ]


def _cached(usage: Any) -> int | None:
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) else None


def _events(body: bytes) -> list[bytes]:
    """The data of each event but the last word."""
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [data for data in lines if data.strip() != b"[DONE]"]


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(data)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
