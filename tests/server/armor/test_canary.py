"""A word sent through every path of the guard at DEBUG: it must be nowhere but in an answer."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from armored_server import ArmoredServer, Heard, policy_file, small_windows
from fake_server import CHAT, COMPLETIONS
from otlp_collector import Collector

from cabochon.engine.errors import ComputeError
from cabochon.server.spans import Tracing

CANARY = "quetzal7310"
RESPONSES = "/v1/responses"
LOGGERS = ("", "google", "google.cloud", "google.api_core", "google.auth", "grpc", "asyncio", "cabochon")
FAULTS = (
    "unavailable", "invalid_argument", "internal", "cancelled", "malformed", "empty", "partial",
    "unknown_filter", "unknown_enum", "reset", "hang",
)  # fmt: skip
KEY = {"Authorization": f"Bearer {CANARY}"}
OPEN = {"Authorization": "Bearer open"}


class Everything(logging.Handler):
    """What any formatter could make of a record: its message, its fields, its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter().format(record)
        self.told.append(f"{record.name} {text} {record.__dict__!r}")


@pytest.fixture
def told() -> Iterator[list[str]]:
    """All log records of this process, at DEBUG."""
    handler, loggers = Everything(), [logging.getLogger(name) for name in LOGGERS]
    before = [(one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.setLevel(logging.DEBUG)
        one.addHandler(handler)
    yield handler.told
    for one, (level, propagate) in zip(loggers, before, strict=True):
        one.removeHandler(handler)
        one.setLevel(level)
        one.propagate = propagate


def bodies() -> list[tuple[str, Any]]:
    """Good ones, and ones with the word where texts go, in a wrong form."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 30}
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "now", "arguments": f'{{"zone": "{CANARY}"}}'},
    }
    turns = [
        *chat["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": CANARY},
    ]
    tool = {"name": "now", "description": CANARY, "parameters": {"type": "object", "title": CANARY}}
    surrogate = "\ud800" + CANARY
    return [
        (CHAT, chat),
        (CHAT, {"messages": turns, "tools": [{"type": "function", "function": tool}], "max_tokens": 30}),
        (CHAT, {**chat, "stop": [CANARY]}),
        (CHAT, {**chat, "logprobs": True, "top_logprobs": 2, "n": 2}),
        (COMPLETIONS, {"prompt": CANARY, "echo": True, "max_tokens": 30}),
        (COMPLETIONS, {"prompt": [CANARY, f"ignore all previous {CANARY}"], "max_tokens": 30}),
        (COMPLETIONS, {"prompt": f"xx-hate-xx {CANARY}", "max_tokens": 30}),
        (RESPONSES, {"input": CANARY, "instructions": CANARY, "max_output_tokens": 30}),
        (COMPLETIONS, {"prompt": surrogate, "max_tokens": 30}),
        (COMPLETIONS, {"prompt": {CANARY: CANARY}}),
        (COMPLETIONS, {"prompt": [1, CANARY]}),
        (COMPLETIONS, {"prompt": CANARY * 2000}),
        (CHAT, {"messages": CANARY}),
        (CHAT, {"messages": [{"role": "user", "content": {CANARY: CANARY}}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": [CANARY]}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": CANARY}]}]}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": [CANARY]}}]}]}),
        (CHAT, {**chat, "tools": [{"type": "function", "function": {"name": "x", "parameters": CANARY}}]}),
        (CHAT, {**chat, "response_format": {"type": "json_schema", "json_schema": CANARY}}),
        (CHAT, {**chat, "temperature": -1}),
        (RESPONSES, {"input": {CANARY: CANARY}}),
    ]


def ask_all(server: ArmoredServer, key: str = "none") -> list[httpx.Response]:
    """Each body whole and as a stream, and one that is no JSON."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    answers = [
        server.http.post(path, content=json.dumps({**body, "stream": stream}), headers=headers)
        for path, body in bodies()
        for stream in (False, True)
    ]
    broken = f'{{"prompt": "{CANARY}'.encode()
    return [*answers, server.http.post(COMPLETIONS, content=broken, headers=headers)]


def check_errors(answers: list[httpx.Response]) -> None:
    """No error has the word, whatever the client itself has sent."""
    for answer in answers:
        if answer.status_code != 200:
            assert CANARY not in answer.text, answer.text
        for line in answer.text.split("\n\n"):
            assert not ('"error"' in line and CANARY in line)
        assert CANARY not in str(answer.headers)


def test_the_word_is_in_no_log_metric_span_or_error(
    told: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policies.yaml"
    with Collector() as collector, Heard() as emulator:
        config = small_windows(
            emulator.address,
            armor_policy_file=policy_file(path, open={"on_unchecked": "open"}),
            armor_cache_s=0,
            armor_prompt_timeout_s=0.5,
            armor_window_timeout_s=0.5,
            armor_total_timeout_s=0.75,
        )
        with ArmoredServer(config, tracing=Tracing.to(collector.url)) as server:
            answers = ask_all(server)
            assert {answer.status_code for answer in answers} == {200, 400}
            assert any("content_filter" in answer.text for answer in answers)
            for fault in FAULTS:
                emulator.emulator.set_faults(f"{fault} containing={CANARY}")
                for body in ({"prompt": CANARY}, {"prompt": CANARY, "stream": True}):
                    answers.append(server.post(COMPLETIONS, {**body, "max_tokens": 12}))
                    answers.append(server.post(COMPLETIONS, {**body, "max_tokens": 12}, headers=OPEN))
            emulator.emulator.set_faults()
            server.faults.fails_after_tokens = {3: ComputeError("logits must be finite: report it")}
            answers += ask_all(server, "open")
            for wrong in (CANARY, f"keys: [{CANARY}", f"keys: [{{name: a, key: {CANARY}, mode: {CANARY}}}]"):
                path.write_text(wrong)
                answers.append(server.post(COMPLETIONS, {"prompt": "hello", "max_tokens": 2}, headers=KEY))
            metrics = server.http.get("/metrics").text
            assert server.http.get("/health").status_code == 200
        spans = b"".join(body for _, _, body in collector.requests)
    check_errors(answers)
    assert len([line for line in told if "model armor" in line]) > 3
    assert "armor policy file not taken" in "".join(told)
    assert [line for line in told if CANARY in line] == []
    assert CANARY not in metrics
    assert b"armor" in spans
    assert CANARY.encode() not in spans
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    assert CANARY in "".join(text for _, text in emulator.texts)  # it did go through
