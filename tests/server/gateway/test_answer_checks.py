"""Answers over a real connection: each rule is broken once by a server that is right otherwise."""

import asyncio
from collections.abc import Iterator

import pytest
from broken_server import BrokenServer, Change, Fault, header, status, text, torn
from fake_server import CHAT, COMPLETIONS

from cabochon.server.gateway.answer_checks import check_answers, check_models, check_prefix, judge_stream
from cabochon.server.gateway.finding import Finding, Result
from cabochon.server.gateway.http_client import Answer, parse_url
from cabochon.server.gateway.subject import MODELS, Subject, find_subject

EVENT = b'data: {"model":"demo","choices":[]}\n\n'
DONE = b"data: [DONE]\n\n"
USAGE = (
    b'data: {"model":"demo","usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,'
    b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
)


@pytest.fixture(scope="module")
def server() -> Iterator[BrokenServer]:
    with BrokenServer(served_model_name=("demo",)) as one:
        yield one


def subject_of(server: BrokenServer) -> Subject:
    subject = asyncio.run(find_subject(parse_url(server.url), None, 2, 1.0))
    assert isinstance(subject, Subject)
    return subject


def stream_of(*pieces: bytes) -> list[Finding]:
    return judge_stream(Answer(200, {"content-type": "text/event-stream"}, list(pieces)))


def broken(findings: list[Finding]) -> dict[str, Result]:
    return {finding.check: finding.result for finding in findings if finding.result is not Result.PASS}


def test_the_first_model_is_asked_and_fields_that_it_knows_are_used(server: BrokenServer) -> None:
    subject = subject_of(server)
    assert (subject.model, subject.extra, subject.long_tokens) == ("demo", {"ignore_eos": True}, 512)
    with server.broken(Fault(path=COMPLETIONS, change=status(400))):
        assert subject_of(server).extra == {}
    with server.broken(Fault(path=MODELS, change=text(b'"parent":null', b'"parent":"base"'))):
        assert asyncio.run(find_subject(parse_url(server.url), None, 2, 1.0)) == "no model in /v1/models"


def test_a_good_server_passes(server: BrokenServer) -> None:
    subject = subject_of(server)
    findings = [
        *asyncio.run(check_models(subject)),
        *asyncio.run(check_answers(subject)),
        *asyncio.run(check_prefix(subject, 16)),
    ]
    assert [finding.check for finding in findings] == [
        "model.listed",
        "model.unknown",
        "answer.status",
        "stream.type",
        "stream.framing",
        "stream.done",
        "stream.usage",
        "stream.cached",
        "model.echo",
        "prefix.cached",
    ]
    assert broken(findings) == {}


@pytest.mark.parametrize(
    ("check", "path", "change"),
    [
        ("model.listed", MODELS, text(b'"demo"', b'"other"')),
        ("model.unknown", COMPLETIONS, status(200)),
    ],
)
def test_rules_about_models_can_fail(check: str, path: str, change: Change, server: BrokenServer) -> None:
    subject = subject_of(server)
    with server.broken(Fault(path=path, change=change)):
        assert broken(asyncio.run(check_models(subject))) == {check: Result.FAIL}


@pytest.mark.parametrize(
    ("check", "path", "change", "result"),
    [
        ("answer.status", COMPLETIONS, status(404), Result.FAIL),
        ("stream.type", CHAT, header("content-type", "application/json"), Result.FAIL),
        ("stream.done", CHAT, text(rb"\[DONE\]", b'{"model":"demo"}'), Result.FAIL),
        ("stream.usage", CHAT, text(b'"total_tokens":[0-9]+', b'"total_tokens":null'), Result.FAIL),
        ("stream.cached", CHAT, text(b"cached_tokens", b"hidden_tokens"), Result.WARN),
        ("model.echo", CHAT, text(b'"model":"demo"', b'"model":"gemma"'), Result.FAIL),
        ("model.echo", COMPLETIONS, text(b'"model":"demo"', b'"model" :"demo"'), Result.FAIL),
    ],
)
def test_rules_about_answers_can_fail(
    check: str, path: str, change: Change, result: Result, server: BrokenServer
) -> None:
    subject = subject_of(server)
    with server.broken(Fault(path=path, change=change)):
        assert broken(asyncio.run(check_answers(subject))) == {check: result}


def test_events_torn_on_the_wire_are_seen_and_their_usage_is_lost(server: BrokenServer) -> None:
    subject = subject_of(server)
    with server.broken(Fault(path=CHAT, change=torn)):
        findings = asyncio.run(check_answers(subject))
    assert broken(findings) == {
        "stream.framing": Result.FAIL,
        "stream.usage": Result.FAIL,
        "stream.cached": Result.WARN,
    }


@pytest.mark.parametrize(
    ("pieces", "measured"),
    [
        ([EVENT[:9], EVENT[9:], USAGE, DONE], "1 pieces without a whole event"),
        ([EVENT.replace(b"data: ", b"data:"), USAGE, DONE], "1 lines without `data: `"),
        ([b"data: {'model'}\n\n", USAGE, DONE], "1 not JSON"),
    ],
)
def test_what_is_wrong_with_the_framing_is_said(pieces: list[bytes], measured: str) -> None:
    findings = stream_of(*pieces)
    assert broken(findings) == {"stream.framing": Result.FAIL}
    assert measured in next(one.measured for one in findings if one.check == "stream.framing")


def test_several_events_in_one_piece_and_comments_are_fine() -> None:
    assert broken(stream_of(EVENT + EVENT, b": ping\n\n", USAGE, DONE)) == {}


def test_an_empty_stream_fails() -> None:
    assert set(broken(stream_of())) == {"stream.framing", "stream.done", "stream.usage", "stream.cached"}


def test_a_prompt_that_no_cache_holds_is_a_warning(server: BrokenServer) -> None:
    subject = subject_of(server)
    with server.broken(Fault(path=COMPLETIONS, change=text(b'"cached_tokens":16', b'"cached_tokens":0'))):
        assert broken(asyncio.run(check_prefix(subject, 16))) == {"prefix.cached": Result.WARN}
