"""Against the naive search: every place where a control string stands, overlapping ones too."""

import time

import hypothesis.strategies as st
from hypothesis import given

from cabochon.server.control_strings import ControlStrings

STRINGS = ["<a>", "<ab>", "<>", "[x]", "<<a>", "ab", "^-]"]


@given(st.text("<>ab[x]^-", max_size=20))
def test_every_place_is_marked(text: str) -> None:
    places = {i for i in range(len(text)) if any(text.startswith(string, i) for string in STRINGS)}
    expected = "".join(char + "|" * (i in places) for i, char in enumerate(text))
    assert ControlStrings(STRINGS).cut(text, "|") == expected


def test_without_strings_nothing_is_marked() -> None:
    assert ControlStrings([]).cut("<a>", "|") == "<a>"
    assert ControlStrings(["<"]).cut("<a>", "|") == "<a>"


def test_a_megabyte_of_beginnings_takes_no_time() -> None:
    control = ControlStrings([f"<unused{i}>" for i in range(6000)])
    for text in ("<" * 10**6, "<unused" * 150_000, "<unused9999>" * 80_000):
        started_s = time.thread_time()
        assert control.cut(text, "|") == text
        assert time.thread_time() - started_s < 2  # with an alternation: a minute
