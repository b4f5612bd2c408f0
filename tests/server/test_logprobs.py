"""Log probabilities in OpenAI's two shapes, over an engine whose values can be worked out by hand."""

from typing import Any

from fake_server import CHAT, COMPLETIONS, TOKENIZER, LiveServer, events

BYTE = 6  # the token of byte 0
HELLO = [TOKENIZER.token_to_id(piece) for piece in ("hello", "▁world")]


def entry(token: str, token_id: int, raw: bytes | None = None) -> dict[str, Any]:
    return {"token": token, "logprob": -token_id / 1000, "bytes": list(raw or token.encode())}


def test_a_completion_scores_its_tokens(live: LiveServer) -> None:
    choice = live.complete(HELLO, max_tokens=3, logprobs=0).json()["choices"][0]
    one, two = (-token_id / 1000 for token_id in HELLO)
    assert choice["logprobs"] == {
        "tokens": ["hello", " world", "hello"],
        "token_logprobs": [one, two, one],
        "top_logprobs": [{}, {}, {}],
        "text_offset": [0, 5, 11],
    }


def test_an_echo_scores_the_prompt_and_its_first_token_has_nothing_before_it(live: LiveServer) -> None:
    choice = live.complete(HELLO, max_tokens=1, echo=True, logprobs=1).json()["choices"][0]
    assert choice["text"] == "hello worldhello"
    assert choice["logprobs"]["tokens"] == ["hello", " world", "hello"]
    one, two = (-token_id / 1000 for token_id in HELLO)
    assert choice["logprobs"]["token_logprobs"] == [None, two, one]
    assert choice["logprobs"]["top_logprobs"] == [None, {" world": two}, {"hello": one}]
    assert choice["logprobs"]["text_offset"] == [0, 5, 11]


def test_an_echo_alone_generates_nothing(live: LiveServer) -> None:
    answer = live.complete(HELLO, max_tokens=0, echo=True, logprobs=0).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    assert choice["logprobs"]["tokens"] == ["hello", " world"]
    assert answer["usage"]["completion_tokens"] == 0
    assert live.complete(HELLO, max_tokens=0).status_code == 400


def test_a_chat_scores_tokens_with_their_bytes(live: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    choice = live.post(CHAT, {**body, "logprobs": True, "top_logprobs": 2}).json()["choices"][0]
    bos, turn = (
        2,
        4,
    )  # the template's first two tokens; special ones have no text, and are scored all the same
    first, second = choice["logprobs"]["content"]
    assert first == {
        **entry("<bos>", bos),
        "top_logprobs": [entry("<bos>", bos), entry("<unk>", bos + 1)],
    }
    assert second["logprob"] == -turn / 1000
    assert choice["logprobs"]["refusal"] is None
    plain = live.post(CHAT, {**body, "logprobs": True}).json()["choices"][0]
    assert [one["top_logprobs"] for one in plain["logprobs"]["content"]] == [[], []]


def test_part_of_a_character_is_shown_by_its_bytes(live: LiveServer) -> None:
    emoji = [BYTE + byte for byte in "👍".encode()]
    choice = live.complete(emoji, max_tokens=4, logprobs=0).json()["choices"][0]
    assert choice["text"] == "👍"
    assert choice["logprobs"]["tokens"] == [f"bytes:\\x{byte:02x}" for byte in "👍".encode()]


def test_a_stream_scores_every_token_where_it_stands(live: LiveServer) -> None:
    body = {
        "prompt": HELLO,
        "max_tokens": 5,
        "logprobs": 1,
        "echo": True,
        "stop": ["never this"],
        "stream": True,
    }
    with live.stream(COMPLETIONS, body) as answer:
        answer.read()
    parts = [event["choices"][0]["logprobs"] for event in events(answer)]
    whole = live.complete(**{**body, "stream": False}).json()["choices"][0]["logprobs"]
    for name in whole:
        assert [value for part in parts if part for value in part[name]] == whole[name]


def test_who_does_not_ask_gets_none(live: LiveServer) -> None:
    assert live.complete(HELLO, max_tokens=1).json()["choices"][0]["logprobs"] is None
    assert live.engine.seen[0].params.logprobs is None
    assert live.engine.seen[0].params.prompt_logprobs is None
