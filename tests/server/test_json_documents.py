"""Two hundred documents by twenty schemas from the demo at temperature 1: most end, and those are valid."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from real_server import RealServer

MAX_TOKENS = 512
STREAMS = 16


def words(size: int = 24) -> dict[str, Any]:
    return {"type": "string", "maxLength": size}


def record(**fields: Any) -> dict[str, Any]:
    """An object with these fields, all required, and no other."""
    return {
        "type": "object", "properties": fields, "required": list(fields), "additionalProperties": False,
    }  # fmt: skip


def integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def several(item: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


POINT = record(x={"type": "number", "minimum": -9, "maximum": 9}, y=integer(0, 99))
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": record(value=integer(0, 9), next={"$ref": "#/$defs/end"}),
        "end": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]},
        "leaf": record(value=words(8)),
    },
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": record(name=words(), age=integer(0, 120)),
    "enum": record(colour={"enum": ["red", "green", "blue"]}, size={"enum": ["S", "M", "L", None, 42]}),
    "unicode enum": record(stadt={"enum": ["Zürich", "東京", "القاهرة", "Москва", "🏝️"]}),
    "unicode names": record(**{"größe": {"type": "boolean"}, "名前": words(8), "🙂": {"const": "é\n\"\\"}}),
    "nested": record(a=record(b=record(c=record(d={"type": "boolean"})))),
    "array": record(tags=several(words(12), most=4, least=1)),
    "matrix": record(rows=several(several(integer(0, 9), 3, 3), 3, 3)),
    "numbers": record(
        price={"type": "number", "minimum": 0, "maximum": 1000},
        ratio={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        count=integer(-5, 5),
        even={"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 100},
    ),
    "refs": {**record(start={"$ref": "#/$defs/p"}, end={"$ref": "#/$defs/p"}), "$defs": {"p": POINT}},
    "tree": TREE,
    "any of": record(value={"anyOf": [{"type": "null"}, words(10), POINT, several({"type": "boolean"})]}),
    "optional": {**record(id=integer(1, 9999)), "properties": {
        "id": integer(1, 9999), "note": words(20), "done": {"type": "boolean"},
    }},
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "formats": record(day={"type": "string", "format": "date"}, id={"type": "string", "format": "uuid"}),
    "all of": {"allOf": [record(a={"type": "boolean"}), {"properties": {"a": {"const": True}}}]},
    "const": record(version={"const": 2}, kind={"const": {"a": [1, None, "x"]}}),
    "tuple": record(pair={"prefixItems": [words(6), integer(0, 9)], **several(False, most=2, least=2)}),
    "root array": several(record(ok={"type": "boolean"}), most=5, least=2),
    "root string": words(30),
    "menu": record(
        title=words(), open={"type": "boolean"},
        dishes=several(record(name=words(16), price=integer(1, 99),
                              diet={"enum": ["vegan", "halal", "none"]}), most=3, least=1),
    ),
}  # fmt: skip


async def documents(server: RealServer, model: str, seeds: range) -> dict[tuple[str, int], tuple[str, str]]:
    """By schema and seed: the finish reason and the text."""
    turns = asyncio.Semaphore(STREAMS)

    async def one(name: str, seed: int) -> tuple[str, str]:
        schema: Any = SCHEMAS[name]
        async with turns:
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": f"Write a document in JSON: {name}."}],
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
                temperature=1,
                seed=seed,
                max_tokens=MAX_TOKENS,
                stream=True,
            )
            text, reason = "", ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                reason = chunk.choices[0].finish_reason or reason
        return reason, text

    async with server.async_client() as client:
        keys = [(name, seed) for seed in seeds for name in SCHEMAS]
        return dict(zip(keys, await asyncio.gather(*(one(*key) for key in keys)), strict=True))


def check(found: dict[tuple[str, int], tuple[str, str]]) -> None:
    assert {reason for reason, _ in found.values()} <= {"stop", "length"}
    endless = Counter(name for (name, _), (reason, _) in found.items() if reason == "length")
    assert endless.total() <= 0.05 * len(found), endless
    for (name, seed), (reason, text) in found.items():
        if reason == "stop":
            try:
                jsonschema.validate(json.loads(text), SCHEMAS[name])
            except ValueError as error:
                raise AssertionError(f"{name}, seed {seed}: {text!r}") from error


@pytest.mark.slow
def test_two_hundred_documents_of_the_demo_are_valid() -> None:
    with RealServer("demo", kv_cache_gib=0.5) as server:
        found = asyncio.run(documents(server, "demo", range(10)))
    assert len(found) == 200
    check(found)
    assert len({text for _, text in found.values()}) > 120, "documents must differ"


def test_documents_of_a_random_model_are_valid(long_gemma2_dir: Path) -> None:
    with RealServer(long_gemma2_dir, dtype="fp32", kv_cache_gib=0.05, served_model_name="tiny") as server:
        found = asyncio.run(documents(server, "tiny", range(1)))
    check({key: one for key, one in found.items() if one[0] == "stop"})
    assert sum(reason == "stop" for reason, _ in found.values()) > len(found) / 2
