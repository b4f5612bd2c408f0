"""How bodies name a grammar, and that a real engine behind the real client follows it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from fake_server import CHAT, LiveServer
from pydantic import BaseModel, Field
from real_server import RealServer

from cabochon.engine.sampling_params import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"enum": [None, 1]}}, "required": ["a"], "x": {"const": None}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "json_schema",
            json.dumps(SCHEMA, separators=(",", ":")),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        (
            {"structured_outputs": {"choice": ["a", 'b"c\n']}},
            "lark",
            'start: CHOICE\nCHOICE: "a" | "b\\"c\\n"',
        ),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark_or_gbnf", 'start: "a"'),
    ],
    ids=range(8),
)
def test_each_form_is_a_grammar(live: LiveServer, fields: dict[str, Any], kind: Any, text: str) -> None:
    assert live.chat(max_tokens=1, **fields).status_code == 200
    assert live.engine.seen[0].params.grammar == Grammar(kind=kind, text=text)
    assert live.engine.seen[0].params.grammar.param == next(iter(fields))


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}], ids=str)
def test_plain_text_has_no_grammar(live: LiveServer, fields: dict[str, Any]) -> None:
    assert live.chat(max_tokens=1, **fields).status_code == 200
    assert live.engine.seen[0].params.grammar is None


@pytest.fixture(scope="module")
def server(tiny_gemma2_dir: Path) -> Iterator[RealServer]:
    with RealServer(tiny_gemma2_dir, dtype="fp32", kv_cache_gib=0.02) as real:
        yield real


@pytest.fixture
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with server.client() as one:
        yield one


class Gem(BaseModel):
    colour: Literal["red", "green"]
    facets: int = Field(ge=0, le=99)
    cuts: list[Literal["cabochon", "rose"]] = Field(max_length=2)


HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_openais_parse_helper_gets_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=client.models.list().data[0].id,
        messages=HELLO,
        response_format=Gem,
        max_tokens=200,
        seed=1,
        n=3,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Gem)


def test_choices_may_be_thousands_and_start_alike(client: openai.OpenAI) -> None:
    words = [f"{number}" for number in range(5000)]
    answers = client.completions.create(
        model=client.models.list().data[0].id,
        prompt="hello",
        max_tokens=20,
        seed=0,
        n=8,
        extra_body={"structured_outputs": {"choice": words}},
    )
    texts = {choice.text for choice in answers.choices}
    assert texts <= set(words)
    assert len(texts) > 1


def test_a_stream_follows_a_choice(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=HELLO,
        stream=True,
        extra_body={"structured_outputs": {"choice": ["first answer", "second answer"]}},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text in ("first answer", "second answer")


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_cannot_be_followed_is_a_400_that_names_the_field(server: RealServer, is_stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=secret)"}}}
    body = {
        "messages": HELLO,
        "stream": is_stream,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    answer = server.http.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
