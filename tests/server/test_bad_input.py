"""What must not be sent gets a 4xx in OpenAI's shape that names the field, and nobody else notices."""

import time
from typing import Any

import pytest
from fake_server import CHAT, COMPLETIONS, LiveServer, events

from cabochon.engine.errors import BadPrompt, ComputeError, EngineDead

SECRET = "the secret words of a user"
MESSAGES = [{"role": "user", "content": SECRET}]


def send(live: LiveServer, content: bytes, path: str = CHAT, **headers: str) -> Any:
    return live.http.post(path, content=content, headers={"Content-Type": "application/json", **headers})


def error_of(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert SECRET not in answer.text
    return error


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"nonsense", b'"text"', b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}', b'{"temperature": NaN}', b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_not_json_in_utf8_is_refused(shared: LiveServer, content: bytes) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        error_of(send(shared, content, path))
    assert shared.complete("hello", max_tokens=1).status_code == 200


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 2**80}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x" * 257]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop_token_ids": [1024]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1024": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include": True}}, "stream_options.include"),
    ({"stream_options": []}, "stream_options"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"request_id": "a b"}, "request_id"),
    ({"model": 5}, "model"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"temprature": 1}, "temprature"),
    ({"logprobs": "yes"}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs"),
    ({"functions": [{}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{i}-{p}" for i, (_, p) in enumerate(WRONG)])
def test_wrong_fields_are_named(shared: LiveServer, fields: dict[str, Any], param: str) -> None:
    for path, rest in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": SECRET})):
        error = error_of(shared.post(path, {**rest, **fields}))
        assert error["param"] == param or error["param"].startswith(f"{param}.")
        assert param in error["message"]
        assert error["type"] == "invalid_request_error"
    assert not shared.engine.open


CALL = {"id": "1", "function": {"name": "f", "arguments": SECRET}}
CHATS: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    ("hello", "messages"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "user", "content": None}], "messages.0.content"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "robot", "content": SECRET}], "messages.0.role"),
    ([{"role": "tool", "content": SECRET}], "messages.0.tool_call_id"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}], "messages.0"),
    ([{"role": "user", "content": SECRET, "tool_calls": [CALL]}], "messages.0.tool_calls"),
    ([{"role": "user", "content": SECRET}] * 2, "messages"),
    ([{"role": "assistant", "content": SECRET}], "messages"),
    ([{"role": "system", "content": SECRET}], "messages"),
    ([{"role": "system", "content": SECRET}, *MESSAGES], "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "param"), CHATS, ids=range(len(CHATS)))
def test_wrong_messages_are_named(shared: LiveServer, messages: Any, param: str) -> None:
    error = error_of(shared.post(CHAT, {"messages": messages}))
    assert error["param"].startswith(param)


PROMPTS: list[Any] = [
    None,
    [],
    [[]],
    5,
    ["a", 5],
    [1, "a"],
    [1.5],
    [True],
    [-1],
    [1024],
    [2**70],
    [[1], "a"],
    {},
    ["a"] * 129,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_wrong_prompts_are_named(shared: LiveServer, prompt: Any) -> None:
    assert error_of(shared.post(COMPLETIONS, {"prompt": prompt}))["param"].startswith("prompt")


@pytest.mark.parametrize("prompt", ["", ["hello", ""]], ids=["one", "in a batch"])
def test_an_empty_prompt_says_how_to_start_from_nothing(shared: LiveServer, prompt: Any) -> None:
    error = error_of(shared.complete(prompt))
    assert (error["param"], error["code"]) == ("prompt", "invalid_prompt")
    assert "send the token id of <bos>" in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": [' + b"[1]," * 10**6 + b"[1]]}",
        b'{"prompt": [' + b'"a",' * 10**6 + b'"a"]}',
        b'{"prompt": [' + b",".join([b"[" + b'"a",' * 30_000 + b"1]"] * 30) + b"]}",
        b'{"messages": [' + b",".join([b'{"content": [' + b"{}," * 30_000 + b"{}]}"] * 30) + b"]}",
        b'{"messages": [{' + b",".join(b'"k%d": 1' % i for i in range(300_000)) + b"}]}",
    ],
    ids=range(5),
)
def test_a_body_made_to_be_slow_is_refused_soon(shared: LiveServer, content: bytes) -> None:
    started_s = time.monotonic()
    error_of(send(shared, content, CHAT if b"messages" in content else COMPLETIONS))
    assert time.monotonic() - started_s < 5  # pydantic's report on each entry took 25 s


def test_too_many_choices_of_a_batch_are_refused(shared: LiveServer) -> None:
    error = error_of(shared.complete(["a"] * 65, n=2))
    assert error["param"] == "n"
    assert "65 · 2" in error["message"]


@pytest.mark.parametrize("field", ["suffix", "best_of"])
def test_old_fields_of_completions_must_ask_for_nothing(shared: LiveServer, field: str) -> None:
    assert error_of(shared.complete(**{field: 3}))["param"] == field
    harmless = {"suffix": "", "best_of": 1}[field]
    assert shared.complete(max_tokens=1, **{field: harmless}).status_code == 200


def test_null_is_no_value_at_every_depth(shared: LiveServer) -> None:
    message = {"role": "user", "content": "hello", "tool_calls": None, "async_": None}
    fields = {"temperature": None, "tools": None, "nonsense": None, "stream_options": {"x": None}}
    assert shared.post(CHAT, {"messages": [message], "max_tokens": 1, **fields}).status_code == 200


def test_fields_without_effect_are_accepted(shared: LiveServer) -> None:
    fields = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "logprobs": False,
        "tools": [],
        "response_format": {"type": "text"}, "parallel_tool_calls": False, "tool_choice": "none",
    }  # fmt: skip
    assert shared.chat(max_tokens=1, **fields).status_code == 200


def test_a_prompt_over_the_context_says_so_in_openais_words(shared: LiveServer) -> None:
    for answer in (
        shared.complete([300] * 1024, max_tokens=1),
        shared.complete([300] * 1000, max_tokens=25),
        shared.complete("hello " * 2000, max_tokens=1),
        shared.complete("hello " * 200_000, max_tokens=1),
        shared.chat("hello " * 200_000),
        shared.chat("hello " * 2000),
        shared.chat("hello", max_tokens=2000),
    ):
        error = error_of(answer)
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 1024 tokens.")


def test_a_chat_without_max_tokens_may_fill_the_context(live: LiveServer) -> None:
    live.faults.tokens_per_step = 500
    usage = live.chat("hello").json()["usage"]
    assert usage["total_tokens"] == 1024


@pytest.mark.parametrize("has_length", [True, False])
def test_a_body_over_the_limit_is_cut_off(has_length: bool) -> None:
    with LiveServer(max_body_bytes=1000) as live:
        content = b'{"prompt": "' + b"x" * 2000 + b'"}'
        parts = content if has_length else iter([content[:500], content[500:]])
        answer = live.http.post(COMPLETIONS, content=parts, headers={"Content-Type": "application/json"})
        assert error_of(answer, 413)["code"] == "body_too_large"
        assert "at most 1000 bytes" in answer.text
        assert live.complete(max_tokens=1).status_code == 200


def test_a_length_that_lies_about_a_long_body_is_refused_unread(live: LiveServer) -> None:
    head = f"POST {CHAT} HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 999999999\n\n"
    assert b"413" in live.raw(head).split(b"\r\n")[0]


def test_what_is_not_declared_as_json_is_refused(shared: LiveServer) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
        answer = send(shared, b'{"prompt": "hello"}', COMPLETIONS, **headers)
        assert error_of(answer, 415)["code"] == "unsupported_media_type"
    answer = send(
        shared, b'{"prompt": "hello"}', COMPLETIONS, **{"Content-Type": "application/json; charset=utf-8"}
    )
    assert answer.status_code == 200


def test_a_refusal_of_the_engine_keeps_its_status_in_a_stream(live: LiveServer) -> None:
    live.faults.refuses = BadPrompt("a prompt must have at least one token, got none: send text", "prompt")
    for stream in (False, True):
        error = error_of(live.complete(stream=stream))
        assert (error["code"], error["param"]) == ("invalid_prompt", "prompt")


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (EngineDead("the engine process ended"), 503, "engine_dead"),
        (ComputeError("logits must be finite"), 500, "model_error"),
        (RuntimeError(SECRET), 500, "internal_error"),
    ],
)
def test_faults_before_the_first_token_have_a_status(
    live: LiveServer, fault: Exception, status: int, code: str
) -> None:
    live.faults.refuses = fault
    for stream in (False, True):
        assert error_of(live.complete(stream=stream), status)["code"] == code


def test_faults_after_the_first_token_are_an_event(live: LiveServer) -> None:
    live.faults.fails_after_tokens = {3: ComputeError("logits must be finite")}
    answer = live.complete([300], max_tokens=9, stream=True)
    assert answer.status_code == 200
    *chunks, last = events(answer)
    assert len(chunks) == 2
    assert last["error"]["code"] == "model_error"
    assert error_of(live.complete([300], max_tokens=9), 500)["code"] == "model_error"


def test_one_bad_choice_ends_the_others_of_its_body(live: LiveServer) -> None:
    live.faults.fails_after_tokens = {3: ComputeError("logits must be finite")}
    error_of(live.complete([300], max_tokens=9, n=3), 500)
    assert not live.engine.open


def test_no_log_line_has_a_users_text(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    live.chat(SECRET, max_tokens=30)
    live.chat(SECRET, temperature="x")
    live.chat(SECRET, max_tokens=5, stream=True)
    live.http.get("/nowhere?" + SECRET)
    assert "request id=" in caplog.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("cabochon")]
    assert not [line for line in ours if "secret" in line]


def test_lists_that_are_too_long_say_how_long_they_may_be(shared: LiveServer) -> None:
    for prompt in (["a"] * 129, [[5]] * 129):
        assert "prompt must have at most 128 prompts, got 129" in error_of(shared.complete(prompt))["message"]
    error = error_of(shared.complete(stop=["a"] * 10_000))
    assert error["message"] == "stop must have at most 16 strings, got 10000: send fewer"
    tokens = {"tokens": [5] * 1025}
    assert (
        "tokens must have at most 1024 ids, got 1025"
        in error_of(shared.post("/detokenize", tokens))["message"]
    )


def test_errors_of_a_chat_name_its_own_fields(shared: LiveServer) -> None:
    assert error_of(shared.chat("hello " * 600))["param"] == "messages"
    assert error_of(shared.chat(max_tokens=5000))["param"] == "max_tokens"
    assert error_of(shared.chat(max_completion_tokens=5000))["param"] == "max_completion_tokens"


def test_numbers_beyond_every_integer_type_are_refused(shared: LiveServer) -> None:
    for name in ("top_k", "seed", "max_tokens", "min_tokens", "priority", "n"):
        for value in (2**31, 2**64, 10**300, -(2**64)):
            if not (name == "seed" and value == 2**31):
                assert error_of(shared.complete(**{name: value}))["param"] == name
    assert error_of(shared.complete(seed=2**63 - 1, n=2))["param"] == "seed"


def test_a_body_must_be_declared_as_json(live: LiveServer) -> None:
    answer = live.http.post(COMPLETIONS, content=b'{"prompt": "hello"}')
    assert answer.status_code == 415
