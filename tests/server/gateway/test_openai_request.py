"""What the picker reads of a body, and what it refuses."""

import json
from typing import Any

import pytest

from cabochon.server.gateway.openai_request import BadBody, read_request, read_usage
from cabochon.server.gateway.scheduling import Request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"role": "user", "content": "hello"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


def read(path: str, **fields: Any) -> Request:
    return read_request(path, json.dumps({"model": "demo", **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hello", (b"hello",)),
        (["a", "b"], (b"a", b"b")),
        ([1, 258], (b"\1\0\0\0\2\1\0\0",)),
        ([[1], [2]], (b"\1\0\0\0", b"\2\0\0\0")),
        ([], (b"",)),
        (None, (b"",)),
        ([-1], (b"",)),
    ],
)
def test_prompts_of_a_completion(prompt: object, prompts: tuple[bytes, ...]) -> None:
    assert read(COMPLETIONS, prompt=prompt) == Request(model="demo", prompts=prompts)


def test_a_chat_is_its_roles_and_texts() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    asked = read(CHAT, messages=[HELLO, parts, {"role": "assistant", "content": None}])
    assert asked.prompts == (b"userhellouserabassistant",)


def test_a_response_is_its_instructions_tools_and_input() -> None:
    one = read("/v1/responses", input="hello", instructions="be short", temperature=0)
    assert one == read("/v1/responses", temperature=1, instructions="be short", input="hello")
    assert one != read("/v1/responses", input="hello")


def test_paths_are_told_by_their_end() -> None:
    assert read("/models/v1/completions?x=1", prompt="a").prompts == (b"a",)
    assert read(f"{CHAT}/render", messages=[HELLO]).prompts == (b"userhello",)
    assert read("/v1/load_lora_adapter").prompts == ()


def test_the_salt_is_part_of_the_request() -> None:
    assert read(COMPLETIONS, prompt="a", cache_salt="s").salt == "s"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"[]", "a string `model`"),
        (b"{}", "a string `model`"),
        (b'{"model": 1}', "a string `model`"),
        (b'{"model": "a", "messages": []}', "at least one message"),
        (b'{"model": "a"}', "at least one message"),
    ],
)
def test_a_body_that_the_picker_cannot_read_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadBody, match=message):
        read_request(CHAT, body)


def test_usage_is_read_from_an_answer_and_from_the_event_that_has_it() -> None:
    assert read_usage(json.dumps({"choices": [], "usage": USAGE}).encode()) == USAGE
    events = [{"choices": [1], "usage": None}, {"choices": [], "usage": USAGE}]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    assert read_usage(text.encode()) == USAGE


def test_an_event_that_the_network_cut_has_no_usage_for_the_picker() -> None:
    assert read_usage(b'data: {"choices": [], "usage": {"prom') is None
    assert read_usage(b'data: {"choices": [1]}\n\n') is None
