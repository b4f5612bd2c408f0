"""Tokens of a body without running it, in the shape that endpoint pickers read."""

from typing import Any

import pytest
from fake_server import CHAT, COMPLETIONS, LiveServer

USER = {"role": "user", "content": "hello"}


def test_a_chat_renders_to_the_tokens_that_would_run(live: LiveServer) -> None:
    fields = {"messages": [USER], "max_tokens": 3, "temperature": 0, "seed": 1}
    rendered = live.post(f"{CHAT}/render", fields).json()
    assert not live.engine.seen
    live.post(CHAT, fields)
    (request,) = live.engine.seen
    assert rendered["token_ids"] == request.prompt_ids
    assert rendered["model"] == "fake"
    assert rendered["request_id"].startswith("chatcmpl-")
    assert (rendered["sampling_params"]["max_tokens"], rendered["sampling_params"]["seed"]) == (3, 1)


def test_tools_are_in_the_tokens(shared: LiveServer) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    plain, with_tools = (
        shared.post(f"{CHAT}/render", {"messages": [USER], **extra}).json()["token_ids"]
        for extra in ({}, {"tools": tools})
    )
    tokenized = shared.post("/tokenize", {"messages": [USER], "tools": tools}).json()
    assert len(with_tools) > len(plain) + 50
    assert with_tools == tokenized["tokens"]


@pytest.mark.parametrize(
    ("prompt", "count"), [("hello", 1), ([5, 6], 1), (["a", "b"], 2), ([[5], [6, 7]], 2)]
)
def test_each_prompt_of_a_completion_is_an_entry(shared: LiveServer, prompt: Any, count: int) -> None:
    rendered = shared.post(f"{COMPLETIONS}/render", {"prompt": prompt, "n": 2}).json()
    assert len(rendered) == count
    tokens = shared.post("/tokenize", {"prompt": "hello"}).json()["tokens"]
    expected = {"hello": [tokens], "[5, 6]": [[5, 6]], "[[5], [6, 7]]": [[5], [6, 7]]}
    if str(prompt) in expected:
        assert [one["token_ids"] for one in rendered] == expected[str(prompt)]


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "hello"})])
def test_a_body_that_could_not_run_cannot_be_rendered(
    shared: LiveServer, path: str, body: dict[str, Any]
) -> None:
    assert shared.post(f"{path}/render", body).status_code == 200
    for fields in ({"temperature": -1}, {"max_tokens": 5000}, {"stop_token_ids": [4000]}):
        assert shared.post(f"{path}/render", {**body, **fields}).status_code == 400
