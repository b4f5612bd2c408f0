"""The real `openai` client against a real server: tools, structured answers and responses.

The model is tiny and random: what its answers look like, the grammars alone decide.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from real_server import RealServer

MODEL = "tiny"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
CITIES = ("Oslo", "Rome")


class GetWeather(BaseModel):
    """Weather of a city."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


class Gem(BaseModel):
    colour: Literal["red", "green"]
    cuts: list[Literal["cabochon", "rose"]] = Field(max_length=2)


TOOL = openai.pydantic_function_tool(GetWeather)
FLAT_TOOL: Any = {"type": "function", **TOOL["function"]}
NOW: Any = {"type": "function", "function": {"name": "now"}}
NAMED: Any = {"type": "function", "function": {"name": "GetWeather"}}


@pytest.fixture(scope="module")
def server(long_gemma2_dir: Path) -> Iterator[RealServer]:
    options = {"dtype": "fp32", "kv_cache_gib": 0.05, "served_model_name": MODEL}
    with RealServer(long_gemma2_dir, **options) as real:
        yield real


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with server.client() as one:
        yield one


def is_weather(arguments: str) -> bool:
    weather = GetWeather.model_validate_json(arguments)
    return weather.city in CITIES


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_follows_its_schema_and_the_loop_goes_on(client: openai.OpenAI, seed: int) -> None:
    messages = list(HELLO)
    for _ in range(2):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=[TOOL, NOW],
            tool_choice="required",
            seed=seed,
            max_tokens=800,
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls
        messages.append(choice.message)  # replayed as it came, nulls and all
        for call in choice.message.tool_calls:
            assert call.type == "function"
            assert is_weather(call.function.arguments) if call.function.name == "GetWeather" else True
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    last = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[TOOL, NOW], tool_choice="none", max_tokens=5
    )
    assert last.choices[0].message.tool_calls is None


def test_a_named_call_ends_with_stop_as_openais_does(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[TOOL, NOW], tool_choice=NAMED, n=2, seed=5, max_tokens=200
    )
    for choice in answer.choices:
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name == "GetWeather"
        assert is_weather(call.function.arguments)
        assert choice.finish_reason == "stop"


def test_the_clients_stream_helper_puts_a_call_together(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL, "messages": HELLO, "tools": [TOOL], "tool_choice": NAMED, "seed": 7,
        "max_tokens": 200,
    }  # fmt: skip
    deltas = []
    with client.chat.completions.stream(**fields) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                deltas.append(event.arguments_delta)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert "".join(deltas) == call.function.arguments
    assert isinstance(call.function.parsed_arguments, GetWeather)
    assert len(deltas) > 3, "the arguments must come in pieces"
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls
    assert whole is not None
    assert whole[0].function.arguments == call.function.arguments  # type: ignore[union-attr]


def test_the_clients_parse_helper_reads_calls(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=HELLO, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
        seed=2, max_tokens=300,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_a_strict_function_leaves_the_model_free_to_talk(client: openai.OpenAI) -> None:
    answers = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[TOOL], n=4, seed=1, max_tokens=20
    )
    for choice in answers.choices:
        assert choice.message.content or choice.message.tool_calls


def test_tools_and_a_schema_of_the_answer_go_together(client: openai.OpenAI) -> None:
    answers = client.chat.completions.parse(
        model=MODEL, messages=HELLO, tools=[TOOL], response_format=Gem, n=8, seed=3, max_tokens=300
    )
    kinds = set()
    for choice in answers.choices:
        if choice.message.tool_calls:
            kinds.add("call")
            assert all(is_weather(call.function.arguments) for call in choice.message.tool_calls)
        else:
            kinds.add("answer")
            assert isinstance(choice.message.parsed, Gem)
    assert kinds == {"call", "answer"}


def test_a_schema_of_a_tool_that_cannot_be_followed_is_a_400_that_names_tools(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=secret)"}}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"
    assert "secret" not in str(caught.value)


def test_a_response_is_a_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hello", max_output_tokens=8, temperature=0)
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage is not None
    assert chat.usage is not None
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert answer.usage.input_tokens == chat.usage.prompt_tokens


def test_a_streamed_response_is_the_same_text(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "input": "hello", "max_output_tokens": 8, "temperature": 0}
    with client.responses.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    whole = client.responses.create(**fields)
    assert "".join(deltas) == whole.output_text
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"


def test_a_response_is_parsed_into_an_object(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model=MODEL, input="hello", text_format=Gem, max_output_tokens=300)
    assert isinstance(answer.output_parsed, Gem)
    assert answer.status == "completed"


def test_calls_of_a_response_are_answered_in_the_next(client: openai.OpenAI) -> None:
    given: list[Any] = [{"role": "user", "content": "hello"}]
    fields: dict[str, Any] = {"model": MODEL, "tools": [FLAT_TOOL], "max_output_tokens": 800}
    first = client.responses.create(input=given, tool_choice="required", **fields)
    given += first.output  # replayed as they came
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls
    for call in calls:
        assert is_weather(call.arguments)
        given.append(
            {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"t": 5})}
        )
    named: Any = {"type": "function", "name": "GetWeather"}
    second = client.responses.create(input=given, tool_choice=named, **fields)
    assert [item.type for item in second.output] == ["function_call"]


def test_many_async_requests_of_all_kinds_go_together(server: RealServer) -> None:
    async def run() -> list[Any]:
        async with server.async_client() as client:
            chat = client.chat.completions.create
            tasks = [
                task
                for seed in (None, 1, 2)
                for task in (
                    chat(
                        model=MODEL, messages=HELLO, max_tokens=5, **({} if seed is None else {"seed": seed})
                    ),
                    chat(model=MODEL, messages=HELLO, tools=[TOOL], tool_choice=NAMED, max_tokens=200),
                    client.responses.create(model=MODEL, input="hello", max_output_tokens=5),
                    client.completions.create(
                        model=MODEL, prompt="hello", max_tokens=5, logprobs=2, echo=True
                    ),
                )
            ]
            return await asyncio.gather(*tasks)

    answers = asyncio.run(run())
    assert len(answers) == 12
    assert server.health() == 200


def test_a_line_of_the_engine_stands_in_the_log_as_one_of_the_server(server: RealServer) -> None:
    (line,) = (one for one in server.output().splitlines() if "engine ready" in one)
    assert "INFO cabochon.engine.load engine ready architecture=Gemma2ForCausalLM" in line
