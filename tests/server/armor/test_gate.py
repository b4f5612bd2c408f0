"""The gate over a live server: what waits for a verdict, what a verdict does, who is asked about what."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import openai
import pytest
from fake_server import CHAT, COMPLETIONS, LiveServer, events, request_bytes, wait_until
from prometheus_client import CollectorRegistry
from scripted_checker import TEMPLATE, ScriptedChecker

from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.gate import Gate
from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.verdicts import Policy

PROMPTS_ONLY = Policy(prompt_template=TEMPLATE, mode="off")
BOTH = Policy(prompt_template=TEMPLATE, response_template=TEMPLATE)
ANSWERS_ONLY = Policy(response_template=TEMPLATE)


class GuardedServer(LiveServer):
    """`checker` says what passes; `policy` may change between requests."""

    def __init__(self, policy: Policy, checker: ScriptedChecker, **options: Any) -> None:
        super().__init__(**options)
        self.policy, self.checker = policy, checker
        self.registry = CollectorRegistry()
        self.service.gate = Gate(
            checker,
            lambda _authorization: self.policy,
            ArmorConfig(),
            GuardMetrics(self.registry),
            self.service.lifecycle.predicted_wait_s,
        )

    def prompt(self, index: int = -1) -> str:
        """What the engine was asked to continue."""
        answer = self.post("/detokenize", {"tokens": self.engine.seen[index].prompt_ids})
        return str(answer.json()["prompt"])


Start = Callable[..., AbstractContextManager[GuardedServer]]


@pytest.fixture
def guarded() -> Iterator[GuardedServer]:
    with GuardedServer(PROMPTS_ONLY, ScriptedChecker()) as server:
        yield server


@contextmanager
def open_post(server: LiveServer, path: str, body: object) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(request_bytes(path, body))
        yield sock


def is_silent(sock: socket.socket, for_s: float = 0.1) -> bool:
    sock.settimeout(for_s)
    try:
        return not sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(5)


@pytest.mark.parametrize("is_stream", [False, True])
def test_no_byte_leaves_before_the_verdict_though_the_answer_is_there(
    guarded: GuardedServer, is_stream: bool
) -> None:
    guarded.checker.is_held = True
    body = {"prompt": "hello world", "max_tokens": 4, "stream": is_stream}
    with open_post(guarded, COMPLETIONS, body) as sock:
        wait_until(lambda: guarded.engine.seen and (is_stream or not guarded.engine.open))
        assert is_silent(sock)
        assert guarded.engine.seen[0].is_private
        assert guarded.engine.published == []
        guarded.checker.release()
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert guarded.engine.published == [guarded.engine.seen[0].request_id]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_blocked_prompt_is_a_400_and_leaves_the_engine(guarded: GuardedServer, is_stream: bool) -> None:
    guarded.faults.is_paused = True
    answer = guarded.chat("be bad", max_tokens=8, stream=is_stream)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (
        "content_filter",
        "invalid_request_error",
        "messages",
    )
    assert error["innererror"] == {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}}
    assert guarded.engine.aborted == [one.request_id for one in guarded.engine.seen]
    assert guarded.engine.published == []
    assert answer.headers["x-guardrail"] == "modelarmor;prompt=block"


def test_the_openai_client_sees_a_bad_request(guarded: GuardedServer) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "bad"}])
        assert caught.value.code == "content_filter"
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="fake", input="bad", stream=True)
        assert (caught.value.code, caught.value.param) == ("content_filter", "input")


def test_the_family_of_the_filter_is_shown_to_those_who_may_see_it(guarded: GuardedServer) -> None:
    guarded.policy = Policy(prompt_template=TEMPLATE, reveal=True)
    result = guarded.chat("bad").json()["error"]["innererror"]["content_filter_result"]
    assert result == {"rai": {"filtered": True, "detected": True}}


def test_every_turn_result_call_and_tool_is_checked_in_one_call(guarded: GuardedServer) -> None:
    tool = {"name": "find", "description": "finds gems", "parameters": {"type": "object"}}
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"what": "opal"}'}}
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "found"},
        {"role": "assistant", "content": "said"},
        {"role": "user", "content": [{"type": "text", "text": "last"}]},
    ]
    body = {"messages": messages, "tools": [{"type": "function", "function": tool}], "max_tokens": 1}
    assert guarded.post(CHAT, body).status_code == 200
    (asked,) = guarded.checker.prompts()
    for text in ("first", '{"what": "opal"}', "found", "said", "last", "finds gems"):
        assert text in asked


@pytest.mark.parametrize("prompt", ["a bad day", ["fine", "a bad day"], [[98, 97], "ids"]])
def test_every_prompt_of_a_completion_is_checked(guarded: GuardedServer, prompt: Any) -> None:
    if prompt[-1] == "ids":
        prompt = [guarded.post("/tokenize", {"prompt": "so bad"}).json()["tokens"]]
    answer = guarded.complete(prompt, max_tokens=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert len(guarded.checker.prompts()) == 1


def test_what_is_refused_anyway_costs_no_check(guarded: GuardedServer) -> None:
    assert guarded.complete("x" * 1100).status_code == 400  # too long
    assert guarded.complete("hello", temperature=-1).status_code == 400
    assert guarded.complete("hello", model="unknown").status_code == 404
    assert guarded.checker.asked == []


def test_an_error_of_the_engine_does_not_wait_for_the_verdict(guarded: GuardedServer) -> None:
    guarded.checker.is_held = True
    guarded.engine.die()
    assert guarded.complete("hello").status_code == 503
    guarded.checker.release()


def test_an_outage_that_is_known_never_reaches_the_engine(guarded: GuardedServer) -> None:
    guarded.checker.is_down, guarded.checker.delay_s = True, 0.02  # more than one turn of the loop
    assert guarded.complete("outage").status_code == 503
    assert guarded.engine.seen == []
    assert guarded.complete("hello").status_code == 200  # a verdict of before may be known


def test_several_choices_wait_for_the_verdict_and_share_their_prompt(guarded: GuardedServer) -> None:
    guarded.checker.is_held = True
    with open_post(guarded, COMPLETIONS, {"prompt": "hello", "n": 3, "max_tokens": 1}) as sock:
        wait_until(lambda: guarded.checker.asked)
        assert is_silent(sock)
        assert guarded.engine.seen == []
        assert guarded.service.lifecycle.num_open == 1  # a drain waits for it
        guarded.checker.release()
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert [one.is_private for one in guarded.engine.seen] == [False] * 3
    assert guarded.checker.prompts() == ["hello"]


def test_behind_a_long_queue_the_check_comes_first(guarded: GuardedServer) -> None:
    guarded.engine.snapshot = guarded.engine.snapshot.__class__(
        pages_total=1024, queued_tokens=1000, prefill_tokens_per_s=100.0
    )
    assert guarded.complete("bad").status_code == 400
    assert guarded.engine.seen == []


def test_a_rewriting_template_comes_first_and_the_engine_sees_its_text() -> None:
    checker = ScriptedChecker(rewrites=True)
    with GuardedServer(PROMPTS_ONLY, checker) as server:
        answer = server.chat("my secret", max_tokens=1)
        assert answer.headers["x-guardrail"] == "modelarmor;prompt=rewritten;response=off"
        assert "my hidden" in server.prompt()
        assert not server.engine.seen[-1].is_private
        answer = server.complete(["my secret", "no change"], max_tokens=1, echo=True)
        assert [choice["text"][:9] for choice in answer.json()["choices"]] == ["my hidden", "no change"]
        call = {"id": "1", "function": {"name": "find", "arguments": '"secret"'}}
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
        turns.append({"role": "tool", "tool_call_id": "1", "content": "y"})
        answer = server.post(CHAT, {"messages": turns})
        assert answer.json()["error"]["code"] == "content_filter"  # arguments have a form to keep


@pytest.mark.parametrize(
    ("policy", "stage"), [(PROMPTS_ONLY, "prompt"), (BOTH, "prompt"), (ANSWERS_ONLY, "response")]
)
def test_without_a_verdict_nothing_passes(policy: Policy, stage: str) -> None:
    with GuardedServer(policy, ScriptedChecker()) as server:
        answer = server.complete("outage", max_tokens=40)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "guardrail_unavailable"
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.headers["x-guardrail"] == f"modelarmor;{stage}=unavailable"
        assert server.engine.open == {}


def test_a_policy_that_is_open_lets_it_pass_and_says_so() -> None:
    policy = Policy(prompt_template=TEMPLATE, response_template=TEMPLATE, on_unchecked="open")
    with GuardedServer(policy, ScriptedChecker()) as server:
        for _ in range(3):
            answer = server.complete("outage", max_tokens=40)
            assert answer.status_code == 200
            assert answer.headers["x-guardrail"] == "modelarmor;prompt=unchecked;response=strict"
        for stage in ("prompt", "response"):
            value = server.registry.get_sample_value("cabochon:guard_fail_open_total", {"stage": stage})
            assert value == 3, stage


def test_a_client_that_goes_away_ends_check_and_request(guarded: GuardedServer) -> None:
    guarded.checker.is_held = guarded.faults.is_paused = True
    with open_post(guarded, COMPLETIONS, {"prompt": "hello", "stream": True}):
        wait_until(lambda: guarded.engine.seen and guarded.checker.asked)
    wait_until(lambda: guarded.engine.aborted and guarded.checker.num_cancelled)
    wait_until(lambda: guarded.service.lifecycle.num_open == 0)


def test_an_answer_in_one_piece_is_checked_once_and_a_stream_in_windows() -> None:
    with GuardedServer(ANSWERS_ONLY, ScriptedChecker()) as server:
        body = {"prompt": "hello world " * 20, "max_tokens": 400}
        answer = server.post(COMPLETIONS, body)
        assert answer.headers["x-guardrail"] == "modelarmor;prompt=skipped;response=strict"
        assert [stage for stage, _, _ in server.checker.asked] == ["response"]
        server.checker.asked.clear()
        with server.stream(COMPLETIONS, body) as stream:
            stream.read()
            text = "".join(event["choices"][0]["text"] for event in events(stream))
        assert text == answer.json()["choices"][0]["text"]
        assert len(server.checker.asked) > 1
        assert stream.headers["x-guardrail"] == "modelarmor;prompt=skipped;response=window"


def test_a_blocked_answer_ends_with_content_filter_and_only_that_choice() -> None:
    with GuardedServer(ANSWERS_ONLY, ScriptedChecker()) as server:
        body = {"prompt": ["hello " * 20, "so bad"], "max_tokens": 40}
        good, bad = server.post(COMPLETIONS, body).json()["choices"]
        assert (good["finish_reason"], bad["finish_reason"]) == ("length", "content_filter")
        assert (len(good["text"]) > 40, bad["text"]) == (True, "")
        with server.stream(COMPLETIONS, body) as stream:
            stream.read()
            ends = {
                event["choices"][0]["index"]: event["choices"][0]["finish_reason"] for event in events(stream)
            }
        assert ends == {0: "length", 1: "content_filter"}


def test_a_blocked_prompt_is_not_counted_as_an_answer_without_checks() -> None:
    with GuardedServer(BOTH, ScriptedChecker()) as server:
        assert server.complete("so bad").status_code == 400
        assert server.complete("hello").status_code == 200
        assert server.registry.get_sample_value("cabochon:guard_windows_per_response_count") == 1


def test_an_outage_in_a_stream_is_an_error_event_without_an_end() -> None:
    with GuardedServer(ANSWERS_ONLY, ScriptedChecker()) as server:
        body = {"prompt": "hello " * 100 + "outage", "max_tokens": 700}
        with server.stream(COMPLETIONS, body) as stream:
            stream.read()
        assert stream.status_code == 200
        assert "outage" not in stream.text
        last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "guardrail_unavailable"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            chunks = client.completions.create(model="fake", stream=True, **body)
            with pytest.raises(openai.APIError, match="content policy"):
                list(chunks)


def test_an_echo_is_a_part_of_the_answer() -> None:
    with GuardedServer(ANSWERS_ONLY, ScriptedChecker()) as server:
        for is_stream in (False, True):
            answer = server.complete("so bad", echo=True, max_tokens=0, stream=is_stream)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
        assert server.engine.seen == []
        assert server.complete("so good", echo=True, max_tokens=1).status_code == 200


def test_without_templates_nothing_is_asked(guarded: GuardedServer) -> None:
    guarded.policy = Policy()
    answer = guarded.complete("bad", max_tokens=1)
    assert answer.status_code == 200
    assert answer.headers["x-guardrail"] == "modelarmor;prompt=skipped;response=off"
    assert guarded.checker.asked == []
    assert not guarded.engine.seen[0].is_private


def test_many_at_once_each_get_their_own_verdict(guarded: GuardedServer) -> None:
    guarded.checker.delay_s = 0.02
    answers: dict[int, httpx.Response] = {}

    def ask(index: int) -> None:
        answers[index] = guarded.complete("bad" if index % 3 == 0 else "good", max_tokens=2)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index].status_code for index in range(24)] == [400, 200, 200] * 8
    assert guarded.engine.open == {}


def test_of_a_chat_that_goes_on_only_the_new_turns_are_asked_about(guarded: GuardedServer) -> None:
    first = {"role": "user", "content": "one"}
    assert guarded.post(CHAT, {"messages": [first], "max_tokens": 1}).status_code == 200
    turns = [first, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    for _ in range(2):
        assert guarded.post(CHAT, {"messages": turns, "max_tokens": 1}).status_code == 200
    assert guarded.checker.prompts() == ["one", "one\n\ntwo\n\nthree"]
    assert [one.is_private for one in guarded.engine.seen] == [True, True, False]  # the last was known


def test_another_template_does_not_know_what_passed(guarded: GuardedServer) -> None:
    for template in (TEMPLATE, TEMPLATE + "2", TEMPLATE):
        guarded.policy = Policy(prompt_template=template)
        assert guarded.complete("hello", max_tokens=1).status_code == 200
    assert len(guarded.checker.asked) == 2


def test_what_was_not_checked_is_asked_again(guarded: GuardedServer) -> None:
    guarded.policy = Policy(prompt_template=TEMPLATE, on_unchecked="open")
    for _ in range(2):
        assert guarded.complete("outage", max_tokens=1).status_code == 200
    assert len(guarded.checker.asked) == 2


def test_a_tightened_template_is_asked_about_what_passed_before(guarded: GuardedServer) -> None:
    for version in ("1", "1", "2"):
        guarded.checker.template_version = version
        assert guarded.complete("hello", max_tokens=1).status_code == 200
    assert len(guarded.checker.asked) == 2


def test_what_is_bad_only_together_does_not_pass_in_parts(guarded: GuardedServer) -> None:
    turns = [{"role": "user", "content": "so b"}, {"role": "assistant", "content": "ad"}]
    guarded.checker.bad = "b\n\nad"
    for turn in turns:
        body = {"messages": [turn, {"role": "user", "content": "x"}][: 1 if turn is turns[0] else 2]}
        guarded.post(CHAT, {**body, "max_tokens": 1})
    assert guarded.post(CHAT, {"messages": turns, "max_tokens": 1}).status_code == 400
    assert guarded.post(CHAT, {"messages": turns[:1], "max_tokens": 1}).status_code == 200
    assert guarded.post(CHAT, {"messages": turns, "max_tokens": 1}).status_code == 400


TOOL_CALL = {"id": "id-of-it", "type": "function", "function": {"name": "name-of-it", "arguments": "{}"}}


@pytest.mark.parametrize(
    "where",
    ["name", "id", "escaped", "regex", "choice", "grammar", "json", "const"],
)
def test_all_that_a_client_may_make_the_model_read_is_checked(guarded: GuardedServer, where: str) -> None:
    guarded.checker.bad = "forbidden"
    call: Any = json.loads(json.dumps(TOOL_CALL))
    body: dict[str, Any] = {"max_tokens": 1}
    match where:
        case "name":
            call["function"]["name"] = "forbidden"
        case "id":
            call["id"] = "forbidden"
        case "escaped":
            call["function"]["arguments"] = '{"a": "\\u0066orbidden"}'
        case "const":
            schema = {"type": "object", "properties": {"x": {"const": "forbidden"}}}
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        case "json":
            body["structured_outputs"] = {"json": {"const": "forbidden"}}
        case "choice":
            body["structured_outputs"] = {"choice": ["forbidden"]}
        case "grammar":
            body["structured_outputs"] = {"grammar": 'start: "forbidden"'}
        case "regex":
            body["structured_outputs"] = {"regex": "forbidden"}
    body["messages"] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "y"},
    ]
    assert guarded.post(CHAT, body).json()["error"]["code"] == "content_filter"
    assert len(guarded.checker.asked) == 1


@pytest.mark.parametrize("prompt", [[-1], [2**33], [5] * 2000])
def test_ids_are_checked_before_they_are_read(guarded: GuardedServer, prompt: list[int]) -> None:
    assert guarded.complete(prompt, max_tokens=1).status_code == 400
    assert guarded.checker.asked == []


@pytest.mark.parametrize("rewrites", [False, True])
def test_a_prompt_that_is_refused_costs_no_check_where_it_comes_first(rewrites: bool) -> None:
    with GuardedServer(PROMPTS_ONLY, ScriptedChecker(rewrites=rewrites)) as server:
        assert server.complete("x" * 1100, n=2).status_code == 400
        assert server.checker.asked == []


def test_a_rewriting_template_takes_one_call_if_nothing_is_rewritten() -> None:
    checker = ScriptedChecker(rewrites=True)
    with GuardedServer(PROMPTS_ONLY, checker) as server:
        turns = [{"role": role, "content": f"{i}"} for i in range(5) for role in ("user", "assistant")]
        assert server.post(CHAT, {"messages": turns[:9], "max_tokens": 1}).status_code == 200
        assert len(checker.asked) == 1
        turns[2]["content"] = "a secret"
        assert server.post(CHAT, {"messages": turns[:9], "max_tokens": 1}).status_code == 200
        assert len(checker.asked) == 2 + 9
        assert "a hidden" in server.prompt()
        many = [{"role": role, "content": "secret"} for _ in range(40) for role in ("user", "assistant")]
        answer = server.post(CHAT, {"messages": many[:67], "max_tokens": 1})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "at most 64" in answer.json()["error"]["message"]


def test_a_text_that_is_blocked_ends_the_checks_of_the_others() -> None:
    checker = ScriptedChecker(rewrites=True)
    with GuardedServer(PROMPTS_ONLY, checker) as server:
        checker.delay_s = 0.05
        checker.bad = "never"
        checker.bad_alone = "2"
        turns = [
            {"role": role, "content": f"secret {i}"} for i in range(20) for role in ("user", "assistant")
        ]
        assert server.post(CHAT, {"messages": turns[:39], "max_tokens": 1}).status_code == 400
        num_asked = len(checker.asked)
        assert num_asked < 20
        assert server.service.lifecycle.num_open == 0
        wait_until(lambda: checker.num_cancelled > 0)
