"""Functions in the prompt and in the grammar. The grammars are run by the parser that enforces them."""

import json
from typing import Any

import numpy as np
import pytest
from fake_server import CHAT, LiveServer, events
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from cabochon.engine.errors import BadSampling
from cabochon.engine.sampling_params import Grammar
from cabochon.server.chat import GEMMA_TEMPLATE, ChatTemplate
from cabochon.server.errors import ApiError
from cabochon.server.protocol import CalledFunction, Message, ToolCall
from cabochon.server.tools import Function, ToolUse, arguments_value, calls_text, tool_use

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
WEATHER = Function(
    name="get_weather",
    description="Weather of a <end_of_turn> city",
    parameters={
        "properties": {"city": {"$ref": "#/$defs/city"}, "$ref": {"const": {"$ref": "#/x"}}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
    },
)
NOW = Function(name="now")
OSLO = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
PARIS = OSLO.replace("Oslo", "Paris")
TIME = '{"name": "now", "parameters": {}}'


class _Bytes:
    """A vocabulary of all bytes, and an end."""

    bos_token_id, eos_token_id, special_token_ids = None, 256, [256]
    tokens = [*(bytes([i]) for i in range(256)), b"<eos>"]  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=[256])  # type: ignore[arg-type]


def allows(grammar: Grammar | None, text: str) -> bool:
    """Whether the grammar allows the text as a whole."""
    assert grammar is not None
    if grammar.kind == "json_schema":
        source = LLMatcher.grammar_from_json_schema(grammar.text)
    else:
        source = LLMatcher.grammar_from_lark(grammar.text)
    matcher = LLMatcher(TOKENIZER, source, log_level=0)
    for byte in text.encode():
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        assert not matcher.is_error(), matcher.get_error()
        if not mask[byte // 8] >> byte % 8 & 1:
            return False
        matcher.consume_token(byte)
    return bool(matcher.is_accepting())


def use(choice: str = "auto", *, is_parallel: bool = True, is_strict: bool = False) -> ToolUse:
    weather = WEATHER.model_copy(update={"strict": is_strict})
    named = None if choice in ("auto", "required") else choice
    mode: Any = choice if named is None else "named"
    return ToolUse(functions=(weather, NOW), choice=mode, named=named, is_parallel=is_parallel)


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        (OSLO, True), (TIME, True), (PARIS, False), ("text", False), ("{}", False), ("", False),
        (f"[{OSLO}, {TIME}]", True), ("[]", False), (f"[{OSLO}, {PARIS}]", False), (f"{OSLO} x", False),
    ],
)  # fmt: skip
def test_required_allows_calls_alone(text: str, is_allowed: bool) -> None:
    assert allows(use("required").grammar(None), text) is is_allowed


def test_without_parallel_calls_there_is_one() -> None:
    for choice in ("required", "auto"):
        grammar = use(choice, is_parallel=False).grammar(None)
        assert allows(grammar, TIME)
        assert not allows(grammar, f"[{TIME}, {TIME}]")


def test_a_named_function_is_the_only_one() -> None:
    grammar = use("now").grammar(None)
    assert allows(grammar, TIME)
    assert not allows(grammar, OSLO)
    assert not allows(grammar, f"[{TIME}]")


def test_nothing_binds_an_answer_that_need_not_call() -> None:
    assert use().grammar(None) is None


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        (OSLO, True), (PARIS, False), (TIME, True), ('{"name": "now", "parameters": {"any": 1}}', True),
        (f"[{OSLO}, {TIME}]", True), (f"[{OSLO}, {PARIS}]", False),
        ("It is fine.", True), ('{"title": 5}', True), ("[1]", True), (f"I say {PARIS}", True),
        ('{"name": "other", "parameters": {}}', False), (f" {PARIS}", False), (f"```json\n{PARIS}", False),
        (f"<tool_call>{PARIS}", False), (f"[{PARIS}]", False),
    ],
)  # fmt: skip
def test_a_strict_function_binds_its_calls_and_no_other_text(text: str, is_allowed: bool) -> None:
    assert allows(use(is_strict=True).grammar(None), text) is is_allowed


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [(OSLO, True), (PARIS, True), ('{"title": "x"}', True), ('{"title": 5}', False), ("text", False)],
)
def test_a_schema_of_the_answer_leaves_room_for_calls(text: str, is_allowed: bool) -> None:
    title = {"$ref": "#/$defs/t", "$defs": {"t": {
        "type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"],
        "additionalProperties": False}}}  # fmt: skip
    grammar = use().grammar(title)
    assert allows(grammar, text) is is_allowed
    assert grammar is not None
    assert grammar.param == "response_format"


@pytest.mark.parametrize(
    ("functions", "choice", "named"), [([], "required", None), ([WEATHER], None, "other"), ([], None, "now")]
)
def test_a_choice_without_its_function_is_refused(
    functions: list[Function], choice: Any, named: str | None
) -> None:
    with pytest.raises(ApiError):
        tool_use(functions, choice, named=named)


def message(role: Any, content: str | None = None, **fields: Any) -> Message:
    return Message(role=role, content=content, **fields)


def called(*calls: tuple[str, str, str], content: str | None = None) -> Message:
    listed = [ToolCall(id=i, function=CalledFunction(name=n, arguments=a)) for i, n, a in calls]
    return message("assistant", content, tool_calls=listed)


def test_functions_stand_before_the_first_user_text_as_gemma_documents_it() -> None:
    template = ChatTemplate(GEMMA_TEMPLATE, SPECIAL, control_strings=("<end_of_turn>",))
    pieces = template.render([message("user", "hi")], functions=[WEATHER, NOW], is_parallel=False)
    assert len(pieces) == 2, "the control token of the description must be cut"
    text = "".join(pieces)
    head = (
        "<bos><start_of_turn>user\n"
        "You have access to functions. If you decide to invoke any of the function(s),\n"
        "you MUST put it in the format of\n"
        '{"name": function name, "parameters": dictionary of argument name and its value}\n\n'
        "You SHOULD NOT include any other text in the response if you call a function\n"
    )
    assert text.startswith(head)
    listed, _, rest = text[len(head) :].partition("\n]\n")
    assert [one["name"] for one in json.loads(listed + "\n]")] == ["get_weather", "now"]
    assert rest == "\nhi<end_of_turn>\n<start_of_turn>model\n"


def test_calls_and_results_become_turns_that_alternate() -> None:
    messages = [
        message("user", "hi"),
        called(("1", "now", ""), ("2", "get_weather", '{"city": "Oslo"}'), content="Wait."),
        message("tool", "5 pm", tool_call_id="1"),
        message("tool", "rain", tool_call_id="2"),
        message("user", "and?"),
        called(("3", "now", "{}")),
        message("tool", "6 pm", tool_call_id="3"),
    ]
    text = "".join(ChatTemplate(GEMMA_TEMPLATE, SPECIAL).render(messages))
    assert text == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n"
        f"<start_of_turn>model\nWait.\n[{TIME}, {OSLO}]<end_of_turn>\n"
        "<start_of_turn>user\n```tool_output\n5 pm\n```\n```tool_output\nrain\n```\nand?<end_of_turn>\n"
        f"<start_of_turn>model\n{TIME}<end_of_turn>\n"
        "<start_of_turn>user\n```tool_output\n6 pm\n```<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_system_text_stands_before_the_functions() -> None:
    template = ChatTemplate(GEMMA_TEMPLATE, SPECIAL, system_role="prepend")
    text = "".join(template.render([message("system", "Be brief."), message("user", "hi")], functions=[NOW]))
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nYou have access to functions.")


def test_arguments_go_back_as_they_came() -> None:
    assert calls_text([("f", '{"a": ')]) == '{"name": "f", "parameters": {"a": }'
    assert calls_text([("f", "")]) == '{"name": "f", "parameters": {}}'


NATIVE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}({{ tool.function.parameters.type }});{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments.city }}{% endfor %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}|{% endfor %}"
)


def test_a_template_that_knows_tools_gets_them_its_own_way() -> None:
    messages = [
        message("user", "hi"),
        called(("1", "get_weather", '{"city": "Oslo"}')),
        message("tool", "rain", tool_call_id="1"),
    ]
    template = ChatTemplate(NATIVE, SPECIAL)
    assert template.render(messages, functions=[NOW]) == [
        "now(object);user:hi|assistant:get_weather=Oslo|tool:rain#1|"
    ]
    assert template.render([called(("1", "get_weather", "no json"))]) == ["assistant:get_weather=|"]


def chat_body(answer: str, **fields: Any) -> dict[str, Any]:
    tools = [{"type": "function", "function": one.model_dump()} for one in (WEATHER, NOW)]
    messages = [{"role": "user", "content": answer + "END"}]
    return {"messages": messages, "tools": tools, "stop": ["END"], "max_tokens": 500, **fields}


def test_a_call_in_an_answer_is_told_as_one(echo: LiveServer) -> None:
    choice = echo.post(CHAT, chat_body(OSLO)).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": '{"city": "Oslo"}',
    }
    assert choice["finish_reason"] == "tool_calls"


def test_a_streamed_call_has_the_same_pieces(echo: LiveServer) -> None:
    with echo.stream(CHAT, chat_body(f"[{OSLO}, {TIME}]")) as answer:
        answer.read()
    deltas = [chunk["choices"][0]["delta"] for chunk in events(answer)]
    assert not any(delta.get("content") for delta in deltas)
    calls: dict[int, str] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", []):
            calls[call["index"]] = calls.get(call["index"], "") + call["function"]["arguments"]
    assert calls == {0: '{"city": "Oslo"}', 1: "{}"}


def test_with_no_choice_a_call_is_text(echo: LiveServer) -> None:
    message = echo.post(CHAT, chat_body(OSLO, tool_choice="none")).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": OSLO, "refusal": None}


def test_the_grammar_of_required_calls_reaches_the_engine(echo: LiveServer) -> None:
    assert echo.post(CHAT, chat_body(OSLO, tool_choice="required")).status_code == 200
    grammar = echo.engine.seen[0].params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.param) == ("json_schema", "tools")


@pytest.mark.parametrize("name", ["auto", "none", "required"])
def test_a_function_may_have_the_name_of_a_keyword(name: str) -> None:
    given = tool_use([Function(name=name), NOW], None, named=name)
    assert given is not None
    grammar = given.grammar(None)
    assert allows(grammar, TIME.replace("now", name))
    assert not allows(grammar, TIME)


def test_a_model_that_repeats_itself_comes_to_an_end() -> None:
    grammar = use("required").grammar(None)
    assert allows(grammar, f"[{', '.join([TIME] * 4)}]")
    assert not allows(grammar, f"[{', '.join([TIME] * 5)}]")


ONE = {"const": 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"$id": "https://a.b/c", "properties": {"a": {"$ref": "#/$defs/c"}}, "$defs": {"c": ONE}},
        {"properties": {"a": {"$ref": "#/definitions/default"}}, "definitions": {"default": ONE}},
        {"properties": {"a": {"$ref": "#/definitions/properties"}}, "definitions": {"properties": ONE}},
        {"properties": {"a": {"anyOf": [{"$ref": "#"}, {"const": 1}]}}},
        {"type": ["object"], "properties": {"a": {"const": 1}}},
    ],
    ids=range(5),
)  # fmt: skip
def test_references_hold_where_the_schema_is_put(schema: dict[str, Any]) -> None:
    bound = {**schema, "required": ["a"], "additionalProperties": False}
    given = tool_use([Function(name="f", parameters=bound)], "required")
    assert given is not None
    assert allows(given.grammar(None), '{"name": "f", "parameters": {"a": 1}}')
    assert not allows(given.grammar(None), '{"name": "f", "parameters": {"a": 2}}')


@pytest.mark.parametrize("fields", [{"is_strict": True}, {"is_parallel": False}], ids=str)
def test_any_object_as_an_answer_would_pass_for_a_call(fields: dict[str, bool]) -> None:
    with pytest.raises(ApiError, match="response_format must not be json_object beside strict functions"):
        use(**fields).grammar({"type": "object"})
    assert use().grammar({"type": "object"}) is not None


def test_a_schema_that_is_too_large_is_refused_before_it_is_moved() -> None:
    huge = Function(name="f", parameters={"properties": {"a": {"enum": list(range(100_000))}}})
    with pytest.raises(BadSampling, match="tools must be of at most 262144 characters"):
        ToolUse(functions=(huge,), choice="required", is_parallel=True).grammar(None)


def test_arguments_too_deep_for_a_template_stay_text() -> None:
    deep = '{"a":' * 200 + "1" + "}" * 200
    assert arguments_value(deep) == deep
    assert ChatTemplate(NATIVE, SPECIAL).render([called(("1", "get_weather", deep))])


def test_a_call_that_a_stop_string_cuts_is_not_told_as_whole(echo: LiveServer) -> None:
    choice = echo.post(CHAT, chat_body(OSLO, stop=["Os"])).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'
    assert choice["finish_reason"] == "stop"
