"""Calls are found however an answer is cut into pieces, and text stays text."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.server.tool_calls import Arguments, CallParser, CallStart, Part, Text
from cabochon.server.tools import calls_text

NAMES = {"f", "get_weather"}
ONE = '{"name": "f", "parameters": {"a": {"b": ["}", "\\"}"]}}}'
ARGUMENTS = '{"a": {"b": ["}", "\\"}"]}}'


def found(*pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer."""
    parser = CallParser(NAMES)
    parts: list[Part] = [part for piece in pieces for part in parser.feed(piece)] + parser.flush()
    text, calls = "", []
    for part in parts:
        match part:
            case Text(more):
                assert more, "an empty piece"
                text += more
            case CallStart(name):
                calls.append((name, ""))
            case Arguments(more):
                assert more, "an empty piece"
                calls[-1] = (calls[-1][0], calls[-1][1] + more)
    return text, calls


@pytest.mark.parametrize(
    "answer",
    [
        ONE,
        f"\n  {ONE}\n",
        f"```json\n{ONE}\n```",
        f"```tool_code\n{ONE}```",
        f"<tool_call>\n{ONE}\n</tool_call>",
        f"[{ONE}]",
        f"[\n  {ONE}\n]\n```",
        ONE.replace("parameters", "arguments"),
        ONE.replace(": ", ":").replace(ARGUMENTS.replace(": ", ":"), ARGUMENTS),
        '{ "name" : "f" ,\n"parameters" : ' + ARGUMENTS + "\n}",
    ],
)
def test_a_call_is_found_in_what_models_write_around_it(answer: str) -> None:
    assert found(answer) == ("", [("f", ARGUMENTS)])
    assert found(*answer) == ("", [("f", ARGUMENTS)])


@pytest.mark.parametrize(
    "answer",
    [
        f"[{ONE}, {ONE}]",
        f"{ONE}\n{ONE}",
        f"{ONE},{ONE}",
        f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>",
    ],
)
def test_several_calls_are_found(answer: str) -> None:
    assert found(answer) == ("", [("f", ARGUMENTS)] * 2)
    assert found(*answer) == ("", [("f", ARGUMENTS)] * 2)


@pytest.mark.parametrize("answer", ['{"name": "f"}', '[{"name": "f"}]'])
def test_a_call_without_arguments_has_an_empty_object(answer: str) -> None:
    assert found(answer) == found(*answer) == ("", [("f", "{}")])


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "The weather is fine.",
        "  {",
        "[1, 2, 3]",
        '{"title": "f", "parameters": {}}',
        '{"name": "unknown", "parameters": {}}',
        '{"name": "f", "parameters": "text"}',
        '{"name": "f", "other": {}}',
        '{"name": "fa',
        "```python\nprint(1)\n```",
        f"I call {ONE}",
        "```",
    ],
)
def test_what_is_no_call_is_text_to_the_letter(answer: str) -> None:
    assert found(answer) == found(*answer) == (answer, [])


def test_text_is_not_held_back_once_it_cannot_be_a_call() -> None:
    parser = CallParser(NAMES)
    assert parser.feed(' {"na') == []
    assert parser.feed("val") == [Text(' {"naval')]
    assert parser.feed('{"name": "f"') == [Text('{"name": "f"')]


def test_text_behind_a_call_is_text() -> None:
    assert found(f"{ONE}\nThat was it.") == ("That was it.", [("f", ARGUMENTS)])
    assert found(*f"[{ONE}] x") == ("x", [("f", ARGUMENTS)])


def test_arguments_that_are_cut_off_are_told_as_far_as_they_came() -> None:
    assert found('{"name": "f", "parameters": {"a": "b') == ("", [("f", '{"a": "b')])


def test_a_further_call_that_is_cut_off_before_its_arguments_is_dropped() -> None:
    assert found(ONE + ', {"name": "f", "para') == ("", [("f", ARGUMENTS)])


OBJECTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8), lambda v: st.lists(v, max_size=3), max_leaves=5
    ),
    max_size=4,
)


@given(st.lists(st.tuples(st.sampled_from(sorted(NAMES)), OBJECTS), min_size=1, max_size=3), st.data())
def test_calls_as_we_write_them_are_read_back(calls: list[tuple[str, Any]], data: st.DataObject) -> None:
    written = [(name, json.dumps(value)) for name, value in calls]
    answer = calls_text(written)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert found(*pieces) == ("", written)


@given(st.text(alphabet='{}[]" \n`namefprters:,xyz', max_size=60), st.data())
def test_the_pieces_of_an_answer_do_not_matter(answer: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(answer)))
    assert found(answer[:cut], answer[cut:]) == found(answer) == found(*answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "f", "parameters": {}}' + " " * 20_000 + "x",
        " " * 60_000 + "x",
        "{" + " " * 20_000 + '"name"',
        "```" + "a" * 20_000,
        '{"name": "f"}' + "} " * 10_000,
    ],
    ids=range(5),
)
def test_a_flood_takes_no_time(answer: str) -> None:
    started_s = time.process_time()
    whole, by_character = found(answer), found(*answer)
    assert whole == by_character
    assert time.process_time() - started_s < 2  # 0.1 s; it was minutes when white space was tried twice
