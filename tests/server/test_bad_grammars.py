"""Grammars that are impossible, huge or malicious, beside a stream that must not feel them."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from real_server import RealServer

DEEP: dict[str, Any] = {"type": "boolean"}
for _ in range(40):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"], "additionalProperties": False}
NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
CHAIN = {f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(5000)} | {"r5000": {"type": "null"}}
CASES: dict[str, tuple[dict[str, Any], set[int]]] = {  # and the statuses there may be
    "refers to itself": ({"json": {"$ref": "#"}}, {400}),
    "a tree": ({"json": NODE}, {200}),
    "deep": ({"json": DEEP}, {200}),
    "unsatisfiable": ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, {400}),
    "conflicting": ({"json": {"allOf": [{"const": 1}, {"const": 2}]}}, {400}),
    "remote": ({"json": {"$ref": "https://example.com/schema"}}, {400}),
    "1,000 properties": ({"json": {"properties": {f"p{i}": {} for i in range(1000)}}}, {200, 400}),
    "20,000 choices": ({"choice": [f"choice {i}" for i in range(20_000)]}, {200, 400}),
    "5,000 choices": ({"choice": [f"choice number {i}" for i in range(5_000)]}, {200}),
    "huge enum": ({"json": {"enum": [f"value {i}" for i in range(12_000)]}}, {200, 400}),
    "endless compilation": ({"json": {"type": "integer", "multipleOf": 9999991}}, {200, 400}),
    "a chain of references": ({"json": json.dumps({"$ref": "#/$defs/r0", "$defs": CHAIN})}, {200, 400}),
    "a regex of a million": ({"regex": "(a{1000}){1000}"}, {200, 400}),
    "too long": ({"regex": "a" * 300_000}, {400}),
}  # fmt: skip
ANSWER_S = 40.0  # 20 s to compile by the clock, and a busy machine
USUAL_GAPS = 12  # a stall is longer than that many usual gaps, and half a second


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with RealServer("demo", kv_cache_gib=0.5) as real:
        yield real


def gaps_of(server: RealServer, stop: threading.Event) -> list[float]:
    """Seconds between the tokens of one stream after another, until told to stop."""
    gaps = []
    while not stop.is_set():
        body = {"prompt": "Gems are", "max_tokens": 60, "ignore_eos": True, "stream": True, "temperature": 0}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            last = None
            for line in answer.iter_lines():
                now = time.monotonic()
                if line.startswith("data: {"):
                    gaps += [] if last is None else [now - last]
                    last = now
    return gaps


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_bad_grammar_is_answered_and_holds_up_nobody(server: RealServer, name: str) -> None:
    asked, statuses = CASES[name]
    stop, gaps = threading.Event(), []
    stream = threading.Thread(target=lambda: gaps.extend(gaps_of(server, stop)))
    stream.start()
    time.sleep(2)
    started_s = time.monotonic()
    body = {"prompt": "x", "max_tokens": 8, "structured_outputs": asked}
    answer = server.http.post("/v1/completions", json=body)
    took_s = time.monotonic() - started_s
    stop.set()
    stream.join()
    assert answer.status_code in statuses, answer.text[:300]
    assert took_s < ANSWER_S
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] == "structured_outputs"
        assert "example.com" not in answer.text
    usual = sorted(gaps)[len(gaps) // 2]
    assert max(gaps) < max(0.5, USUAL_GAPS * usual), (max(gaps), usual)
    assert server.health() == 200
