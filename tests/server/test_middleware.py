"""Whatever happens inside, the client gets an answer and the log one line."""

import asyncio
import json
import logging
from typing import Any

import pytest
from fake_server import LiveServer
from starlette.types import Message, Receive, Scope, Send

from cabochon.server.auth import ApiKeys
from cabochon.server.logs import set_up_logging
from cabochon.server.middleware import Border


def call(app: Any, path: str = "/v1/x") -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    asyncio.run(Border(app, ApiKeys(None))(scope, receive, send))
    return sent


async def crash(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise RuntimeError("a bug")


async def crash_late(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("a bug")


def test_a_bug_is_a_500_with_an_id_and_its_place_but_not_its_words_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    start, body = call(crash)
    assert start["status"] == 500
    headers = dict(start["headers"])
    assert json.loads(body["body"])["error"]["code"] == "internal_error"
    assert f"request failed id={headers[b'x-request-id'].decode()}" in caplog.text
    assert "error=RuntimeError at" in caplog.text
    assert "in crash" in caplog.text
    assert "RuntimeError: a bug" not in caplog.text  # words of an exception may be words of a user


def test_a_bug_after_the_start_adds_no_second_answer(caplog: pytest.LogCaptureFixture) -> None:
    assert [message["type"] for message in call(crash_late)] == ["http.response.start"]
    assert "request failed" in caplog.text


def test_the_access_line_has_tokens_and_times(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cabochon")
    live.complete([300, 301], max_tokens=3)
    (record,) = [record for record in caplog.records if record.name == "cabochon.server.middleware"]
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["prompt_tokens"] == 2
    assert fields["completion_tokens"] == 3
    assert fields["status"] == 200
    assert 0 <= fields["ttft_ms"] <= fields["ms"]
    assert "method=POST path=/v1/completions status=200" in record.getMessage()


def test_probes_and_scrapes_are_not_logged(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cabochon")
    for path in ("/health", "/-/healthz", "/metrics"):
        live.http.get(path)
    assert not [record for record in caplog.records if record.name.startswith("cabochon")]


@pytest.fixture
def root_logger() -> Any:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


def test_json_lines_carry_the_fields(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("json", "info")
    logging.getLogger("cabochon.x").info("request %s", "id=1", extra={"fields": {"id": "1", "status": 200}})
    logging.getLogger("cabochon.x").debug("not shown")
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        logging.getLogger("cabochon.x").exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["severity"] == "INFO"
    assert (first["message"], first["id"], first["status"]) == ("request id=1", "1", 200)
    assert "RuntimeError: a bug" in second["exception"]


def test_plain_lines_are_for_people(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("plain", "warning")
    logging.getLogger("cabochon.x").warning("hello %d", 1)
    logging.getLogger("cabochon.x").info("not shown")
    assert capsys.readouterr().err.rstrip().endswith("WARNING cabochon.x hello 1")


def test_a_path_cannot_forge_a_line(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cabochon")
    live.http.get("/nope%0Aforged%1b[31m" + "x" * 1000)
    (record,) = [r for r in caplog.records if r.name == "cabochon.server.middleware"]
    assert "\n" not in record.getMessage()
    assert "\x1b" not in record.getMessage()
    assert len(record.getMessage()) < 600
