"""The shapes of answers, typed by hand from OpenAI's reference."""

from typing import Any, Literal

import pytest
from tiny_tokenizer import tiny_tokenizer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.server.formats import Format, Usage
from cabochon.server.generation import Delta

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def format_of(kind: Literal["chat", "completion"]) -> Format:
    return Format(kind, "id-1", "gemma", 1700000000, "fp", TokenBytes(tiny_tokenizer()))


def frame(name: str) -> dict[str, Any]:
    return {
        "id": "id-1", "object": name, "created": 1700000000, "model": "gemma", "system_fingerprint": "fp",
    }  # fmt: skip


def delta(text: str = "", reason: Literal["stop", "length"] | None = None, index: int = 0) -> Delta:
    return Delta(index, text, 1, 0, reason)


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
    answer = format_of("chat").whole(["a", ""], ["stop", "length"], [None, None], Usage(7, 4, 5))
    assert answer == {
        **frame("chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a", "refusal": None},
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


def test_a_whole_completion_has_texts() -> None:
    answer = format_of("completion").whole(["a", "b"], ["stop", "length"], [None, None], Usage(7, 4, 5))
    assert answer == {
        **frame("text_completion"),
        "choices": [
            {"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "b", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": USAGE,
    }


@pytest.mark.parametrize(
    ("step", "is_first", "content"),
    [
        (delta("hi"), True, {"role": "assistant", "content": "hi"}),
        (delta(""), True, {"role": "assistant", "content": ""}),
        (delta("hi"), False, {"content": "hi"}),
        (delta("", "stop"), False, {}),
        (delta("", "length"), True, {"role": "assistant", "content": ""}),
        (delta("hi", "stop"), False, {"content": "hi"}),
    ],
    ids=str,
)
def test_the_role_is_told_once_and_empty_content_only_beside_it(
    step: Delta, is_first: bool, content: dict[str, str]
) -> None:
    assert format_of("chat").chunk(step, is_first=is_first, usage={}) == {
        **frame("chat.completion.chunk"),
        "choices": [{"index": 0, "delta": content, "logprobs": None, "finish_reason": step.finish_reason}],
    }


@pytest.mark.parametrize("is_first", [True, False])
def test_a_chunk_of_a_completion_has_its_text(is_first: bool) -> None:
    chunk = format_of("completion").chunk(delta("hi", "stop", index=3), is_first=is_first, usage={})
    assert chunk == {
        **frame("text_completion"),
        "choices": [{"index": 3, "text": "hi", "logprobs": None, "finish_reason": "stop"}],
    }


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("usage", [{"usage": None}, {"usage": USAGE}], ids=["null", "given"])
def test_a_chunk_carries_the_usage_it_is_given(
    kind: Literal["chat", "completion"], usage: dict[str, Any]
) -> None:
    plain = format_of(kind).chunk(delta("hi"), is_first=False, usage={})
    assert format_of(kind).chunk(delta("hi"), is_first=False, usage=usage) == {**plain, **usage}


@pytest.mark.parametrize(
    ("kind", "name"), [("chat", "chat.completion.chunk"), ("completion", "text_completion")]
)
def test_the_last_event_has_usage_and_no_choices(kind: Literal["chat", "completion"], name: str) -> None:
    assert format_of(kind).last(Usage(7, 4, 5)) == {**frame(name), "choices": [], "usage": USAGE}
