"""Bodies: null is absence at any depth, unions name the field at fault, bounds, and what asks for nothing."""

import json
from typing import Any

import pytest

from cabochon.server.body import MAX_DEPTH, MAX_ITEMS, parse, without_nulls
from cabochon.server.errors import ApiError
from cabochon.server.protocol import (
    ASKS_NOTHING,
    NO_EFFECT,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

SECRET = "the secret words of a user"
USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "hi", **fields}).encode())


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": list(messages) or [USER], **fields}).encode())


def refusal(make: Any, *args: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(*args, **fields)
    assert caught.value.status == 400
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {}),
        ({"a": None}, {}),
        ({"a": {"b": None, "c": 1}}, {"a": {"c": 1}}),
        ({"a": {"b": {"c": {"d": None}}}}, {"a": {"b": {"c": {}}}}),
        ({"a": [{"b": None}, {"c": [{"d": None, "e": 0}]}]}, {"a": [{}, {"c": [{"e": 0}]}]}),
        ({"a": [[{"b": None}]]}, {"a": [[{}]]}),
        ({"a": 0, "b": "", "c": False, "d": []}, {"a": 0, "b": "", "c": False, "d": []}),
    ],
    ids=str,
)
def test_a_null_field_is_no_field_at_any_depth(given: dict[str, Any], kept: dict[str, Any]) -> None:
    assert without_nulls(given) == kept


def test_a_null_in_a_list_stays_and_is_named() -> None:
    assert without_nulls([None, {"a": None}]) == [None, {}]
    assert refusal(completion, stop=["a", None]).param == "stop.1"


def test_null_fields_leave_the_defaults() -> None:
    nulls = dict.fromkeys(["temperature", "n", "stop", "stream_options", "logit_bias", "seed", "best_of"])
    assert completion(**nulls, nonsense=None) == completion()
    assert chat({**USER, "name": None, "tool_calls": None, "x": None}, tools=None) == chat()


def test_what_must_be_given_is_not_given_by_null() -> None:
    error = refusal(completion, prompt=None)
    assert str(error) == "prompt must be given: add it"
    assert (error.param, error.code) == ("prompt", "missing_required_parameter")


CONTENT = "messages.0.content"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [["a"]]}, "prompt.0.0"),
        ({"prompt": [[1], [2, SECRET]]}, "prompt.1.1"),
        ({"prompt": [1, SECRET]}, "prompt.1"),
        ({"prompt": [SECRET, 1]}, "prompt.0"),
        ({"prompt": True}, "prompt"),
        ({"prompt": {"text": SECRET}}, "prompt"),
        ({"stop": {"a": SECRET}}, "stop"),
        ({"stop": ["a", 5]}, "stop.1"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"logit_bias": {"5": SECRET}}, "logit_bias"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids.1"),
        ({"stream_options": {"include_usage": SECRET}}, "stream_options.include_usage"),
        ({"cache_salt": 5}, "cache_salt"),
    ],
    ids=str,
)
def test_a_wrong_value_in_a_union_is_named_without_the_unions_branch(
    fields: dict[str, Any], param: str
) -> None:
    error = refusal(completion, **fields)
    assert (error.param, error.code) == (param, "invalid_value")
    assert str(error).startswith(f"{param} is not valid: ")


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        ({**USER, "content": [{"type": "text"}]}, f"{CONTENT}.0.text", "must be given: add it"),
        ({**USER, "content": [{"type": "text", "text": 1}]}, f"{CONTENT}.0.text", "valid string"),
        ({**USER, "content": [{"type": "text", "text": "a"}, SECRET]}, f"{CONTENT}.1", "not valid"),
        (
            {**USER, "content": [{"type": "image_url", "image_url": SECRET}]},
            f"{CONTENT}.0.image_url",
            "is not a parameter of this endpoint: leave it out",
        ),
        ({**USER, "content": 5}, CONTENT, "not valid"),
        ({"content": SECRET}, "messages.0.role", "must be given: add it"),
        ({**USER, "role": SECRET}, "messages.0.role", "'system', 'developer', 'user', 'assistant' or 'tool'"),
        (SECRET, "messages.0", "not valid"),
    ],
    ids=str,
)
def test_a_wrong_message_is_named_to_the_part(message: Any, param: str, says: str) -> None:
    error = refusal(chat, message)
    assert error.param == param
    assert str(error).startswith(param)
    assert says in str(error)


def test_of_two_wrong_fields_the_first_is_named_however_deep_the_other_is() -> None:
    assert refusal(completion, stop=["a", 5], seed=SECRET).param == "seed"


def test_an_unknown_field_is_told_before_other_faults() -> None:
    error = refusal(completion, temperature=SECRET, temprature=1)
    assert str(error) == "temprature is not a parameter of this endpoint: leave it out"
    assert error.code == "unknown_parameter"


@pytest.mark.parametrize(
    "name",
    [
        "top-p",
        "max tokens",
        "str",
        "int",
        "2",
    ],
)
def test_an_unknown_field_of_any_name_is_named(name: str) -> None:
    assert refusal(completion, **{name: 1}).param == name


@pytest.mark.parametrize("raw", [b"[1]", b'"x"', b"5", b"null", b"true"])
def test_a_body_that_is_no_object_says_so(raw: bytes) -> None:
    error = refusal(parse, CompletionRequest, raw)
    assert str(error) == "the body must be a JSON object: send {...}"
    assert error.code == "invalid_json"


@pytest.mark.parametrize("raw", [b"", b"{", b'{"prompt": "\xff"}', b'{"seed": ' + b"1" * 5000 + b"}"])
def test_a_body_that_is_no_json_says_so(raw: bytes) -> None:
    error = refusal(parse, CompletionRequest, raw)
    assert str(error).startswith("the body must be JSON in UTF-8: ")
    assert error.code == "invalid_json"


def test_a_body_nested_too_deeply_says_so() -> None:
    raw = b'{"prompt": ' + b"[" * 100_000
    assert "nested too deeply" in str(refusal(parse, CompletionRequest, raw))
    raw = b'{"prompt": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}"
    assert "nested at most 100 deep" in str(refusal(parse, CompletionRequest, raw))


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_fields_without_effect_may_hold_anything(name: str) -> None:
    for value in ("x", 5, {"a": ["b"]}, False):
        assert completion(**{name: value}) == completion()


@pytest.mark.parametrize("name", ASKS_NOTHING)
def test_what_is_not_implemented_may_ask_for_nothing(name: str) -> None:
    for value in ASKS_NOTHING[name]:
        assert completion(**{name: value}) == completion()
    error = refusal(completion, **{name: SECRET})
    assert str(error).startswith(f"{name} must be absent or ")
    assert str(error).endswith(": this server supports nothing else")
    assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields", [{"best_of": True}, {"best_of": 1.0}, {"suffix": False}, {"functions": {}}], ids=str
)
def test_an_equal_value_of_another_type_asks_for_something(fields: dict[str, Any]) -> None:
    assert refusal(completion, **fields).code == "unsupported_parameter"


def test_a_body_has_a_number_of_items_that_itself_is_accepted() -> None:
    for whole in (["a"] * MAX_ITEMS, {str(i): i for i in range(MAX_ITEMS)}, [[1] * MAX_ITEMS] * 2):
        assert without_nulls(whole) == whole
    error = refusal(without_nulls, {"a": ["a"] * (MAX_ITEMS // 2), "b": [{"c": 1}] * (MAX_ITEMS // 4)})
    assert "must have at most 32768 items in all" in str(error)


def test_a_prompt_of_token_ids_may_be_longer_than_other_lists() -> None:
    ids = list(range(MAX_ITEMS + 1))
    assert completion(prompt=ids).prompt == ids


@pytest.mark.parametrize(("stop", "strings"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_one_stop_string_is_a_list_of_one(stop: Any, strings: list[str]) -> None:
    assert completion(stop=stop).stop_strings == strings


def test_the_text_of_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]
    assert [message.text for message in chat({**USER, "content": parts}, USER).messages] == ["ab", "hi"]


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"])
def test_numbers_may_be_written_without_a_point_and_not_as_text_or_bool(field: str) -> None:
    assert getattr(completion(**{field: 1}), field) == 1
    for value in ("1", True, [1]):
        assert refusal(completion, **{field: value}).param == field


def test_each_endpoint_has_its_own_fields() -> None:
    assert refusal(completion, messages=[USER]).param == "messages"
    assert refusal(chat, prompt="hi").param == "prompt"
    assert refusal(completion, max_completion_tokens=5).param == "max_completion_tokens"
    assert parse(TokenizeRequest, b'{"prompt": "hi", "user": "u"}').add_special_tokens
    assert refusal(parse, DetokenizeRequest, b'{"tokens": ["a"]}').param == "tokens.0"


def test_completions_make_16_tokens_and_chats_have_no_limit_of_their_own() -> None:
    assert completion().max_tokens == 16
    assert chat().max_tokens is None


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "5"}


def test_a_chat_may_hold_calls_and_their_results() -> None:
    turns = chat(USER, CALLED, RESULT, {**CALLED, "content": "text"}, RESULT, RESULT, USER).messages
    assert [turn.text for turn in turns] == ["hi", "", "5", "text", "5", "5", "hi"]
    assert turns[1].tool_calls is not None
    assert turns[1].tool_calls[0].function.name == "f"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER, RESULT], "messages.1.tool_call_id"),
        ([USER, CALLED, {**RESULT, "tool_call_id": SECRET}], "messages.2.tool_call_id"),
        ([USER, CALLED, USER, RESULT], "messages.3.tool_call_id"),
        ([USER, CALLED, {"role": "tool", "content": "5"}], "messages.2.tool_call_id"),
        ([{**USER, "tool_call_id": "1"}], "messages.0.tool_call_id"),
        ([{**USER, "tool_calls": [CALL]}], "messages.0.tool_calls"),
        ([{"role": "user"}], "messages.0.content"),
        ([USER, {"role": "assistant", "tool_calls": []}], "messages.1.content"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "type": SECRET}]}], "messages.0.tool_calls.0.type"),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}],
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
    ids=str,
)
def test_calls_and_results_that_do_not_belong_together_are_named(messages: list[Any], param: str) -> None:
    assert refusal(chat, *messages).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{**TOOL, "type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": SECRET}}]}, "tools.0.function.name"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": SECRET}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"response_format": {"type": SECRET}}, "response_format.type"),
    ],
    ids=str,
)
def test_wrong_tools_are_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(chat, **fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        (
            {"tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools.0.function.parameters",
        ),
        ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
    ids=str,
)
def test_tools_that_do_not_fit_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(lambda: chat(**fields).grammar()).param == param


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none"},
    ],
    ids=str,
)
def test_without_tools_nothing_may_be_called(fields: dict[str, Any]) -> None:
    assert chat(**fields).tool_use() is None


def test_completions_may_turn_logprobs_off_with_false() -> None:
    assert completion(logprobs=False).num_logprobs is None
    assert refusal(completion, logprobs=True).param == "logprobs"


FORMAT = {"type": "json_schema"}


def test_what_clients_add_to_an_answer_may_come_back() -> None:
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {"a": None}}
    answer = {"role": "assistant", "content": "x", "parsed": {"a": 1}, "annotations": [], "refusal": None}
    call = {"role": "assistant", "tool_calls": [{**CALL, "function": function}]}
    turns = chat(USER, answer, USER, call, RESULT, {"role": "assistant", "refusal": "no"}).messages
    assert [turn.text for turn in turns] == ["hi", "x", "hi", "", "5", "no"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {**FORMAT, "json_schema": {"schema": 5}}}, "response_format.json_schema.schema"),
        ({"response_format": {**FORMAT, "json_schema": {"x": 5}}}, "response_format.json_schema.x"),
        ({"logit_bias": {SECRET: "a"}}, "logit_bias"),
    ],
    ids=str,
)  # fmt: skip
def test_the_path_of_a_fault_is_the_clients(fields: dict[str, Any], param: str) -> None:
    assert refusal(chat, **fields).param == param
