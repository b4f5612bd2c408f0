"""/v1/responses: the chat that a body asks for, the object, and the events by which it grows."""

import json
from typing import Any

import pytest
from fake_server import TOKENIZER, LiveServer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.engine.errors import ComputeError
from cabochon.engine.messages import TokenLogprobs
from cabochon.server.body import parse
from cabochon.server.errors import ApiError
from cabochon.server.formats import Head, Usage
from cabochon.server.generation import Delta
from cabochon.server.logprobs import ScoredTokens
from cabochon.server.response_events import ResponseAnswer
from cabochon.server.responses import ResponsesRequest

RESPONSES = "/v1/responses"
SECRET = "the secret words of a user"
TOOL = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
CALL = '{"name": "now", "parameters": {}}'


def body(given: Any = "hi", **fields: Any) -> ResponsesRequest:
    return parse(ResponsesRequest, json.dumps({"input": given, **fields}).encode())


def turns(given: Any, **fields: Any) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in body(given, **fields).as_chat().messages]


def refusal(given: Any = "hi", **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        body(given, **fields).as_chat()
    assert caught.value.status == 400
    assert SECRET not in str(caught.value)
    return caught.value


def test_a_text_is_a_user_message_and_instructions_stand_before_it() -> None:
    assert turns("hi") == [("user", "hi")]
    assert turns("hi", instructions="Be brief.") == [("system", "Be brief."), ("user", "hi")]


def test_items_are_messages() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    answer = {
        "type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "phase": None,
        "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    assert turns([{"role": "user", "content": parts}, answer, {"role": "user", "content": "d"}]) == [
        ("user", "ab"), ("assistant", "c"), ("user", "d"),
    ]  # fmt: skip


def test_calls_and_their_results_are_messages_of_a_chat() -> None:
    call = {"type": "function_call", "name": "now", "arguments": "{}", "async_": None, "caller": None}
    items = [
        {"role": "user", "content": "hi"},
        {**call, "call_id": "1"},
        {**call, "call_id": "2", "id": "fc_1", "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": "5 pm"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "6"}]},
    ]
    messages = body(items).as_chat().messages
    assert [(one.role, one.text) for one in messages] == [
        ("user", "hi"), ("assistant", ""), ("tool", "5 pm"), ("tool", "6"),
    ]  # fmt: skip
    assert [call.id for call in messages[1].tool_calls or ()] == ["1", "2"]


def test_a_schema_and_tools_are_those_of_a_chat() -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}}
    chat = body(text=text, tools=[TOOL], tool_choice={"type": "function", "name": "now"}).as_chat()
    assert chat.response_format is not None
    assert chat.response_format.schema_() == {"type": "object"}
    use = chat.tool_use()
    assert use is not None
    assert (use.choice, use.named, use.functions[0].strict) == ("named", "now", True)


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True}, {"reasoning": {"effort": None}}, {"background": False},
        {"truncation": "disabled"}, {"include": []}, {"include": ["reasoning.encrypted_content"]},
        {"previous_response_id": None}, {"text": {"format": {"type": "text"}}}, {"user": "u"},
        {"text": {"verbosity": "low"}}, {"stream_options": {"include_obfuscation": False}},
    ],
    ids=str,
)  # fmt: skip
def test_what_asks_for_nothing_changes_nothing(fields: dict[str, Any]) -> None:
    given, plain = body(**fields).as_chat(), body().as_chat()
    assert given.messages == plain.messages
    assert given.grammar() is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"given": []}, "input"),
        ({"given": 5}, "input"),
        ({"given": [{"type": SECRET}]}, "input.0"),
        ({"given": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"given": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"given": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"given": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input.0.arguments"),
        (
            {"given": [{"type": "function_call_output", "call_id": "1", "output": SECRET}]},
            "messages.0.tool_call_id",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param is not None
    assert error.param == param or error.param.startswith(f"{param}.")


def test_errors_use_the_words_of_this_endpoint(shared: LiveServer) -> None:
    def error(**fields: Any) -> Any:
        answer = shared.post(RESPONSES, {"input": "hi", **fields})
        assert answer.status_code == 400
        return answer.json()["error"]

    assert error(input="hello " * 600)["param"] == "input"
    assert error(input="hello " * 600)["code"] == "context_length_exceeded"
    assert error(instructions="x")["param"] == "input"
    assert error(max_output_tokens=5000)["param"] == "max_output_tokens"
    lonely = [{"type": "function_call_output", "call_id": "1", "output": "x"}]
    assert error(input=lonely)["param"] == "input.call_id"
    assert error(input=lonely)["message"].startswith("input.call_id must be the id of a call")
    assert error(instructions="x")["message"].startswith("input must have no system")
    no_object = {"type": "function", "name": "f", "parameters": {"type": "string"}}
    assert error(tools=[no_object])["param"] == "tools.0.parameters"
    assert error(tools=[no_object])["message"].startswith("tools.0.parameters must be a schema")
    schema = {"enum": ["a" * 1000] * 300}
    huge = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert "messages" not in error(input="hello " * 600)["message"]
    assert error(text=huge)["message"].startswith("text.format must be")
    assert error(text=huge, tools=[TOOL])["param"] == "text.format"


def test_a_whole_response_is_openais_object(shared: LiveServer) -> None:
    answer = shared.post(RESPONSES, {"input": "hello", "max_output_tokens": 8}).json()
    assert answer["object"] == "response"
    assert answer["id"].startswith("resp-")
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert [part["type"] for part in item["content"]] == ["output_text"]
    assert answer["usage"]["output_tokens"] == 8
    assert answer["usage"]["total_tokens"] == 8 + answer["usage"]["input_tokens"]
    assert (answer["error"], answer["store"], answer["parallel_tool_calls"]) == (None, False, True)


def sse(text: str) -> list[Any]:
    """The data of named events, whose names must be their types."""
    found = []
    for event in filter(None, text.split("\n\n")):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def stream(server: LiveServer, given: str, **fields: Any) -> list[Any]:
    with server.stream(RESPONSES, {"input": given, **fields}) as answer:
        answer.read()
    return sse(answer.text)


def test_a_streamed_text_grows_in_openais_events(echo: LiveServer) -> None:
    events = stream(echo, "hello thereEND", stop=["END"])
    kinds = [event["type"] for event in events]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "hello there"
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    last = events[-1]["response"]
    assert last["status"] == "completed"
    assert last["output"] == [events[-2]["item"]]
    assert last["output"][0]["content"][0]["text"] == "hello there"
    assert {event["item_id"] for event in events if "item_id" in event} == {last["output"][0]["id"]}
    assert events[0]["response"]["usage"] is None


def test_a_stream_that_is_cut_off_ends_incomplete(echo: LiveServer) -> None:
    last = stream(echo, "hello there", max_output_tokens=2)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_streamed_calls_are_items_of_their_own(echo: LiveServer) -> None:
    events = stream(echo, f"[{CALL}, {CALL}]END", stop=["END"], tools=[TOOL])
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item["type"] for item in added] == ["function_call"] * 2
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [event["arguments"] for event in done] == ["{}", "{}"]
    assert [event["output_index"] for event in done] == [0, 1]
    response = events[-1]["response"]
    assert [item["name"] for item in response["output"]] == ["now", "now"]
    assert len({item["call_id"] for item in response["output"]}) == 2
    assert response["status"] == "completed"


def test_an_empty_answer_is_an_empty_message(echo: LiveServer) -> None:
    answer = echo.post(RESPONSES, {"input": "END", "stop": ["END"]}).json()
    assert answer["output"][0]["content"][0]["text"] == ""
    assert answer["status"] == "completed"


def test_log_probabilities_are_told_with_the_text(echo: LiveServer) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 3}
    whole = echo.post(RESPONSES, {"input": "hello", **fields}).json()["output"][0]["content"][0]
    assert len(whole["logprobs"]) == 3
    assert len(whole["logprobs"][0]["top_logprobs"]) == 2
    events = stream(echo, "hello", **fields)
    told = [one for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
    assert told == whole["logprobs"]


def test_a_failure_in_a_stream_is_told_as_failed(live: LiveServer) -> None:
    live.faults.fails_after_tokens = {3: ComputeError("logits must be finite, they are not: report it")}
    last = stream(live, "hello")[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "finite" in last["response"]["error"]["message"]


def test_metadata_comes_back(shared: LiveServer) -> None:
    body = {"input": "hello", "max_output_tokens": 1, "metadata": {"a": "b"}}
    assert shared.post(RESPONSES, body).json()["metadata"] == {"a": "b"}


def test_text_behind_a_call_is_replayed_in_the_same_turn() -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "Wait."}]},
        {"type": "function_call_output", "call_id": "1", "output": "5"},
    ]
    messages = body(items).as_chat().messages
    assert [(one.role, one.text) for one in messages] == [
        ("user", "hi"),
        ("assistant", "Wait."),
        ("tool", "5"),
    ]


def test_a_grammar_is_named_as_this_endpoint_names_it() -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    grammar = body(text=text).as_chat().grammar()
    assert grammar is not None
    assert grammar.param == "text.format"


def test_a_call_that_a_stop_string_cuts_is_an_incomplete_item(echo: LiveServer) -> None:
    given = '{"name": "now", "parameters": {"a": "OsloEND'
    item = echo.post(RESPONSES, {"input": given, "stop": ["END"], "tools": [TOOL]}).json()["output"][0]
    assert (item["type"], item["arguments"], item["status"]) == ("function_call", '{"a": "Oslo', "incomplete")


def response(*steps: Delta, **fields: Any) -> tuple[list[Any], Any]:
    """The events of a stream, or the object, of an answer that comes in these deltas."""
    asked = body(**fields)
    token_bytes = TokenBytes(TOKENIZER)
    head = Head(
        answer_id="resp-1", model="m", created=0, fingerprint="f", token_bytes=token_bytes, usage=Usage(1)
    )
    answer = ResponseAnswer(head, asked, asked.as_chat().tool_use())
    if not asked.stream:
        for step in steps:
            answer.add(step)
        return [], answer.whole()
    events = [*answer.opening(), *(one for step in steps for one in answer.events(step)), *answer.closing()]
    found = sse(b"".join(events).decode())
    return found, found[-1]["response"]


SCORED = ScoredTokens([7], [TokenLogprobs(-1.0, [], [])])
BLOCKED = Delta(0, "", 1, 0, "content_filter")
HALVES = ["Half of ", f"[{CALL}, " + CALL[:20], '{"na']


@pytest.mark.parametrize("text", HALVES)
def test_a_whole_response_that_is_blocked_has_an_empty_message(text: str) -> None:
    _, answer = response(Delta(0, text, 1, 0, None, SCORED), BLOCKED, tools=[TOOL])
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    (item,) = answer["output"]
    assert (item["type"], item["status"]) == ("message", "incomplete")
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


@pytest.mark.parametrize("text", HALVES)
def test_a_streamed_response_that_is_blocked_ends_incomplete_with_what_it_had_said(text: str) -> None:
    first = Delta(0, text, 1, 0, None, SCORED)
    before, _ = response(first, Delta(0, "", 1, 0, None), tools=[TOOL], stream=True)
    events, answer = response(first, BLOCKED, tools=[TOOL], stream=True)
    said = [event["delta"] for event in events if event["type"].endswith(".delta")]
    assert said == [event["delta"] for event in before if event["type"].endswith(".delta")]
    assert events[-1]["type"] == "response.incomplete"
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    assert answer["output"][-1]["status"] == "incomplete"
    if not said:
        assert answer["output"][-1]["content"][0]["logprobs"] == []
