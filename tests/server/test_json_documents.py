"""Generated documents against their schemas, as clients get them: valid to another judge, and ended."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from json_schemas import SCHEMAS
from jsonschema import Draft202012Validator
from real_server import RealServer

STREAMS = 16
QUICK = ("person", "numbers", "references", "unicode names", "any of")


async def generate(
    server: RealServer, names: Iterable[str], each: int, max_tokens: int
) -> list[tuple[str, str, str]]:
    """Name of the schema, finish reason and text, of `each` documents a schema."""
    slots = asyncio.Semaphore(STREAMS)
    async with server.async_client() as client:

        async def one(name: str, seed: int) -> tuple[str, str, str]:
            async with slots:
                stream = await client.completions.create(
                    model="demo",
                    prompt=f"A JSON document, {name}: ",
                    temperature=1,
                    seed=seed,
                    max_tokens=max_tokens,
                    stream=True,
                    extra_body={"structured_outputs": {"json": SCHEMAS[name]}},
                )
                choices = [chunk.choices[0] async for chunk in stream]
                return name, str(choices[-1].finish_reason), "".join(choice.text for choice in choices)

        wanted = [(name, 1000 * i + seed) for i, name in enumerate(names) for seed in range(each)]
        return await asyncio.gather(*(one(*pair) for pair in wanted))


def check(documents: list[tuple[str, str, str]]) -> None:
    """All that ended are valid, and nearly all ended."""
    for name, reason, text in documents:
        if reason == "stop":
            judge = Draft202012Validator(SCHEMAS[name], format_checker=Draft202012Validator.FORMAT_CHECKER)
            judge.validate(json.loads(text))
    reasons = Counter(reason for _, reason, _ in documents)
    assert set(reasons) <= {"stop", "length"}
    assert reasons["stop"] >= 0.95 * len(documents), reasons


def test_the_schemas_themselves_are_valid() -> None:
    assert len(SCHEMAS) == 20
    for content in SCHEMAS.values():
        Draft202012Validator.check_schema(content)


def test_a_few_documents_of_a_random_model_are_valid(tiny_gemma2_dir: Path) -> None:
    options: dict[str, Any] = {"dtype": "fp32", "kv_cache_gib": 0.05, "page_tokens": 4}
    with RealServer(tiny_gemma2_dir, served_model_name="demo", **options) as server:
        check(asyncio.run(generate(server, QUICK, each=4, max_tokens=450)))


@pytest.mark.slow
def test_two_hundred_documents_of_twenty_schemas_are_valid() -> None:
    with RealServer("demo") as server:
        check(asyncio.run(generate(server, SCHEMAS, each=10, max_tokens=512)))
