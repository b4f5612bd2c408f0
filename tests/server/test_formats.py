"""The shapes of answers, typed by hand from OpenAI's reference."""

import json
from typing import Any

import pytest
from tiny_tokenizer import tiny_tokenizer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.engine.messages import TokenLogprobs
from cabochon.server.errors import ApiError
from cabochon.server.formats import Answer, ChatAnswer, CompletionAnswer, Head, Usage
from cabochon.server.generation import Delta, EndReason
from cabochon.server.logprobs import ScoredTokens
from cabochon.server.tools import Function, ToolUse

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 4},
}
CALL = '{"name": "f", "parameters": {"a": 1}}'


def head(**options: bool) -> Head:
    return Head(
        answer_id="id-1", model="gemma", created=1700000000, fingerprint="fp",
        token_bytes=TokenBytes(tiny_tokenizer()), usage=Usage(7, 4, 5), **options,
    )  # fmt: skip


def chat(num_choices: int = 1, tools: ToolUse | None = None, **options: bool) -> ChatAnswer:
    return ChatAnswer(head(**options), num_choices, tools)


def completion(echo: tuple[str, ...] = ("",), **options: bool) -> CompletionAnswer:
    return CompletionAnswer(head(**options), list(echo))


def tools(choice: str = "auto") -> ToolUse:
    named = "f" if choice == "f" else None
    mode: Any = choice if named is None else "named"
    return ToolUse(functions=(Function(name="f"),), choice=mode, named=named, is_parallel=True)


def frame(name: str) -> dict[str, Any]:
    return {
        "id": "id-1", "object": name, "created": 1700000000, "model": "gemma", "system_fingerprint": "fp",
    }  # fmt: skip


def delta(text: str = "", reason: EndReason | None = None, index: int = 0) -> Delta:
    return Delta(index, text, 1, 0, reason)


def scored(text: str, index: int = 0) -> Delta:
    return Delta(index, text, 1, 0, None, ScoredTokens([7], [TokenLogprobs(-1.0, [], [])]))


def whole(answer: Answer, *deltas: Delta) -> dict[str, Any]:
    for one in deltas:
        answer.add(one)
    return answer.whole()


def parsed(events: list[bytes]) -> list[Any]:
    return [json.loads(one.removeprefix(b"data: ")) for one in events if one != b"data: [DONE]\n\n"]


def streamed(answer: Answer, *deltas: Delta) -> list[Any]:
    return [event for one in deltas for event in parsed(answer.events(one))]


def test_usage_adds_up() -> None:
    assert Usage(7, cached_tokens=4, completion_tokens=5).as_json() == USAGE


def test_usage_of_a_new_body_has_generated_nothing() -> None:
    assert Usage(7).as_json() == {
        "prompt_tokens": 7,
        "completion_tokens": 0,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_whole_chat_has_messages() -> None:
    answer = whole(chat(2), delta("a"), delta("b", "stop"), delta("", "length", 1))
    assert answer == {
        **frame("chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": USAGE,
    }


def test_a_whole_completion_has_texts_behind_their_echoes() -> None:
    answer = whole(completion(("x", "")), delta("a", "stop"), delta("b", "length", 1))
    assert answer == {
        **frame("text_completion"),
        "choices": [
            {"index": 0, "text": "xa", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "b", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": USAGE,
    }


@pytest.mark.parametrize(
    ("steps", "contents"),
    [
        ([delta("hi")], [{"role": "assistant", "content": "hi"}]),
        ([delta("")], [{"role": "assistant", "content": ""}]),
        ([delta(""), delta("hi")], [{"role": "assistant", "content": ""}, {"content": "hi"}]),
        ([delta("a"), delta(""), delta("", "stop")], [{"role": "assistant", "content": "a"}, {}]),
        ([delta("", "length")], [{"role": "assistant", "content": ""}]),
        ([delta("a"), delta("b", "stop")], [{"role": "assistant", "content": "a"}, {"content": "b"}]),
    ],
    ids=str,
)
def test_the_role_is_told_once_and_empty_content_only_beside_it(
    steps: list[Delta], contents: list[Any]
) -> None:
    chunks = streamed(chat(), *steps)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == contents
    assert chunks[-1] == {
        **frame("chat.completion.chunk"),
        "choices": [
            {"index": 0, "delta": contents[-1], "logprobs": None, "finish_reason": steps[-1].finish_reason}
        ],
    }


def test_a_chunk_of_a_completion_has_its_text_and_the_first_the_echo() -> None:
    chunks = streamed(completion(("", "x")), delta("hi", index=1), delta("", index=1), delta("ho", "stop", 1))
    texts = [("xhi", None), ("ho", "stop")]
    assert chunks == [
        {
            **frame("text_completion"),
            "choices": [{"index": 1, "text": text, "logprobs": None, "finish_reason": reason}],
        }
        for text, reason in texts
    ]


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("options", "usage", "last"),
    [
        ({}, {}, []),
        ({"include_usage": True}, {"usage": None}, [USAGE]),
        ({"continuous_usage": True}, {"usage": USAGE}, []),
        ({"include_usage": True, "continuous_usage": True}, {"usage": USAGE}, [USAGE]),
    ],
    ids=str,
)
def test_a_stream_tells_the_usage_it_is_asked_for(
    make: Any, options: dict[str, bool], usage: dict[str, Any], last: list[Any]
) -> None:
    (plain,) = streamed(make(), delta("hi"))
    answer = make(**options)
    assert streamed(answer, delta("hi")) == [{**plain, **usage}]
    closing = answer.closing()
    assert closing[-1] == b"data: [DONE]\n\n"
    assert parsed(closing) == [{**plain, "choices": [], "usage": one} for one in last]


@pytest.mark.parametrize("make", [chat, completion])
def test_a_failure_is_an_event_in_the_shape_of_an_error(make: Any) -> None:
    error = ApiError("why", status=500, type="server_error", code="x")
    assert parsed(make().failure(error)) == [error.body()]


def test_a_call_is_no_content_and_names_itself_the_reason_of_the_end() -> None:
    choice = whole(chat(tools=tools()), delta(CALL, "stop"))["choices"][0]
    (call,) = choice["message"].pop("tool_calls")
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "text", "reason", "told"),
    [
        ("auto", CALL, "stop", "tool_calls"),
        ("required", CALL, "stop", "tool_calls"),
        ("f", CALL, "stop", "stop"),
        ("auto", "text", "stop", "stop"),
        ("required", CALL[:-3], "length", "length"),
    ],
)
def test_the_reason_of_the_end_is_openais(choice: str, text: str, reason: EndReason, told: str) -> None:
    answer = whole(chat(tools=tools(choice)), delta(text, reason))
    assert answer["choices"][0]["finish_reason"] == told


def test_a_streamed_call_is_named_first_and_its_arguments_come_in_pieces() -> None:
    pieces = [delta(CALL[:4]), delta(CALL[4:32]), delta(CALL[32:35]), delta(CALL[35:], "stop")]
    chunks = [chunk["choices"][0] for chunk in streamed(chat(tools=tools()), *pieces)]
    assert chunks[0]["delta"] == {"role": "assistant", "content": None}
    (first,) = chunks[1]["delta"]["tool_calls"]
    assert first.pop("id").startswith("call_")
    assert first == {"index": 0, "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    assert chunks[2]["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": ": 1"}}]}
    assert chunks[3]["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}
    assert [chunk["finish_reason"] for chunk in chunks] == [None, None, None, "tool_calls"]


def test_two_calls_in_one_delta_are_two_entries() -> None:
    (chunk,) = streamed(chat(tools=tools()), delta(f"[{CALL}, {CALL}]", "stop"))
    calls = chunk["choices"][0]["delta"]["tool_calls"]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"]["arguments"] for call in calls] == ['{"a": 1}'] * 2
    assert calls[0]["id"] != calls[1]["id"]


BLOCKED = delta("", "content_filter")


def test_a_whole_chat_that_is_blocked_has_neither_text_nor_calls_nor_log_probabilities() -> None:
    for made in (chat(2), chat(2, tools())):
        answer = whole(made, scored("Half of "), delta(CALL, index=1), delta("b", "stop", 1), BLOCKED)
        assert answer["choices"][0] == {
            "index": 0,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": "content_filter",
        }
        assert answer["choices"][1]["finish_reason"] != "content_filter"
    called = whole(chat(tools=tools()), delta(f"{CALL}, " + CALL[:20]), BLOCKED)["choices"][0]
    assert called["message"] == {"role": "assistant", "content": "", "refusal": None}
    assert called["finish_reason"] == "content_filter"


@pytest.mark.parametrize("held", ['{"na', f"{CALL}, " + CALL[:20]])
def test_a_streamed_chat_that_is_blocked_says_so_and_drops_what_its_parser_holds(held: str) -> None:
    answer = chat(tools=tools())
    answer.events(delta(held))
    (chunk,) = streamed(answer, BLOCKED)
    assert chunk["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "content_filter"}
    ]
    assert answer.closing() == [b"data: [DONE]\n\n"]


def test_a_completion_that_is_blocked_keeps_its_echo_alone() -> None:
    answer = whole(completion(("x", "")), scored("Half of "), delta("b", "stop", 1), BLOCKED)
    assert answer["choices"] == [
        {"index": 0, "text": "x", "logprobs": None, "finish_reason": "content_filter"},
        {"index": 1, "text": "b", "logprobs": None, "finish_reason": "stop"},
    ]


def test_a_streamed_completion_that_is_blocked_says_so() -> None:
    answer = completion()
    answer.events(delta("Half of "))
    (chunk,) = streamed(answer, BLOCKED)
    assert chunk["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "content_filter"}]
