"""Mutations of valid bodies against a real server: 2xx or 4xx, and the engine's pages come back."""

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import wait_until
from lora_maker import make_adapter
from real_server import RealServer

from cabochon.engine.models.hf_config import load_model_config

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "x", None]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]
SAMPLING: dict[str, Any] = {
    "temperature": 1.5, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "seed": 5, "stop": ["q", "zz"],
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2, "logit_bias": {"7": 3.5},
    "min_tokens": 2, "stop_token_ids": [9], "ignore_eos": False, "priority": 1, "cache_salt": "s",
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "max_tokens": 6}),
    ("/v1/chat/completions", {"messages": MESSAGES[:1], "max_tokens": 6, "n": 2, **SAMPLING}),
    ("/v1/chat/completions", {"messages": MESSAGES[:1], "response_format": FORMAT, "max_tokens": 20}),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES[:1], "stream": True, "stream_options": {"include_usage": True},
         "logprobs": True, "top_logprobs": 3, "max_completion_tokens": 6},
    ),
    ("/v1/completions", {"prompt": "hello", "echo": True, "logprobs": 2, "max_tokens": 6, **SAMPLING}),
    ("/v1/completions", {"prompt": [[5, 6, 7], [8]], "n": 2, "max_tokens": 6, "stream": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "structured_outputs": {"regex": "a+b"}, "max_tokens": 6}),
    ("/v1/responses", {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 6, "stream": True}),
    ("/v1/responses", {"input": "hi", "instructions": None, "text": {"format": {"type": "text"}},
                       "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
                       "max_output_tokens": 6}),
    ("/v1/chat/completions/render", {"messages": MESSAGES, "tools": [TOOL]}),
    ("/tokenize", {"messages": MESSAGES[:1], "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a", "load_inplace": True}),
    ("/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": 1}),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 0.5, -0.0, 1e308, 1e-320, "", "a", "\0",
    "\ud83d", "🙂" * 50, [], {}, [[]], [None], {"a": {}}, {"": ""}, ["a"] * 300, [1] * 300, [[1]] * 200,
    "auto", "required",
    {"type": "object", "$ref": "#"}, {"$ref": "http://example.com"}, {"type": "json_object"}, "(a{100}){100}",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all that is in a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(body: dict[str, Any], rng: random.Random) -> bytes:
    """Some places with other values, gone, doubled or renamed; now and then a few bytes, too."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        *way, last = rng.choice(list(places(body)) or [("x",)])
        place: Any = body
        for key in way:
            place = place[key]
        match rng.randrange(5):
            case 0 | 1:
                place[last] = copy.deepcopy(rng.choice(VALUES))
            case 2 if isinstance(place, list) or last in place:
                del place[last]
            case 3 if isinstance(place, list):
                place.append(copy.deepcopy(rng.choice(place)))
            case _:
                if isinstance(place, dict):
                    place[rng.choice(["x", "n", "seed", "type", "stop", "role", "top_p"])] = rng.choice(
                        VALUES
                    )
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.1:
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


async def send_all(server: RealServer, count: int) -> tuple[Counter[int], list[str]]:
    """Statuses, and the bodies (of this test's making) that got none of 2xx and 4xx or no proper end."""
    rng = random.Random(5)
    bodies = [(path, mutated(body, rng)) for path, body in (rng.choice(VALID) for _ in range(count))]
    statuses: Counter[int] = Counter()
    bad: list[str] = []
    turns = asyncio.Semaphore(16)

    async def send(client: httpx.AsyncClient, path: str, raw: bytes) -> None:
        async with turns:
            answer = await client.post(path, content=raw, headers={"Content-Type": "application/json"})
        statuses[answer.status_code] += 1
        is_stream = answer.headers["content-type"].startswith("text/event-stream")
        is_ended = not is_stream or answer.text.endswith("\n\n")
        if (
            answer.status_code not in (200, 400, 404, 409)
            or not is_ended
            or '"code":"internal_error"' in answer.text
        ):
            bad.append(f"{answer.status_code} {path} {raw!r}")

    async with httpx.AsyncClient(base_url=server.url, timeout=120, verify=False) as client:
        await asyncio.gather(*(send(client, *one) for one in bodies))
    return statuses, bad


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_bodies_are_answered_or_refused_and_leave_nothing(
    long_gemma2_dir: Path, tmp_path: Path, count: int
) -> None:
    make_adapter(tmp_path / "a", load_model_config(long_gemma2_dir), 8)
    options = {"dtype": "fp32", "kv_cache_gib": 0.05, "max_model_len": 1024, "served_model_name": "tiny"}
    with RealServer(long_gemma2_dir, lora_dir=str(tmp_path), **options) as server:
        statuses, bad = asyncio.run(send_all(server, count))
        assert not bad, bad[:5]
        assert statuses[200] > count / 10, statuses
        assert statuses[400] > count / 10, statuses
        assert sum(statuses.values()) == count
        wait_until(lambda: server.metric("num_requests_running") == 0)
        assert server.metric("num_requests_waiting") == 0
        assert server.metric("kv_cache_usage_perc") == 0
        assert server.health() == 200
        assert "Traceback" not in server.output()
