"""Cuts split no character as a reader sees one and no run without blanks, but one that is too long."""

import time

import hypothesis.strategies as st
import pytest
import regex
from guarded_choice import UNSPLIT
from hypothesis import given

from cabochon.server.armor.safe_cut import MAX_RUN, has_words, safe_cut

FAMILY = "👩‍👩‍👧"
PARTS = [
    "a",
    "bc",
    " ",
    "\r\n",
    "\n",
    "é",
    "e\u0301",
    " \u0301",
    FAMILY,
    "🇩🇪",
    "你",
    "好",
    "。",
    "한",
    "นี้",
    "\u0600",
    "🇩",
    "\u200d",
    "\u0903",
]
TEXTS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=40).map("".join)


def clusters(text: str) -> set[int]:
    """Where they end; 0 too."""
    return {0} | {found.end() for found in regex.finditer(r"\X", text)}


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("one two", 5, 4),
        ("one two", 4, 4),
        ("one two", 3, 3),
        ("one two", 2, 0),
        ("see https://a.example/b now", 20, 4),
        ("to a.b@c.example", 15, 3),
        ("a\r\nb", 2, 1),
        ("ab e\u0301f", 4, 3),
        (f"a {FAMILY} b", 4, 2),
        ("x \u0301y", 2, 1),
        ("我们今天去公园", 4, 4),
        ("今天。请看https://例え.jp/x谢", 10, 3),
        ("今天、用a@b.cn谢谢你", 8, 3),
        ("名字は猫である", 3, 3),
        ("가나 다라", 1, 0),
        ("ab", 0, 0),
    ],
)
def test_a_cut_is_before_what_it_would_split(text: str, limit: int, cut: int) -> None:
    assert safe_cut(text, limit) == cut


def test_a_run_without_blanks_is_split_when_it_is_too_long() -> None:
    assert safe_cut("a" * 5000, MAX_RUN) == 0
    assert safe_cut("a" * 5000, MAX_RUN + 1) == MAX_RUN + 1
    assert safe_cut("b " + "a" * 5000, MAX_RUN + 2) == 2
    assert safe_cut("b " + "a" * 5000, MAX_RUN + 3) == MAX_RUN + 3
    assert safe_cut("a" * 3000 + FAMILY + "a", 3002) == 3000


def test_so_is_a_character_without_an_end() -> None:
    assert safe_cut("a" + "\u0301" * 5000, MAX_RUN) == 0
    assert safe_cut("a" + "\u0301" * 5000, MAX_RUN + 1) == MAX_RUN + 1


def test_where_every_blank_is_in_a_character_any_border_of_one_is_good_behind_the_longest_run() -> None:
    text = "\u0600 \u0301" * 3000
    assert safe_cut(text, MAX_RUN) == 0
    assert [safe_cut(text, limit) for limit in range(2049, 2053)] == [2049, 2049, 2049, 2052]
    assert safe_cut("a b" + text, MAX_RUN + 1) == 2
    assert safe_cut("a b" + text, 7000) == 6999


def test_an_odd_flag_waits_for_its_other_half() -> None:
    flags = "a " + "🇩" * 5000
    assert [safe_cut(flags, limit) for limit in (2050, 2051, 2052)] == [2, 2050, 2052]
    assert safe_cut("a 🇩" + "🇩🇪" * 5000, 2053) == 2052


@pytest.mark.parametrize("unit", UNSPLIT)
def test_the_work_is_linear(unit: str) -> None:
    text = (unit * 40_000)[:40_000]
    begin_s = time.thread_time()
    assert 0 < safe_cut(text, 39_000) <= 39_000
    assert time.thread_time() - begin_s < 0.25


@given(TEXTS, st.data())
def test_no_cut_is_inside_a_character_or_a_run(text: str, data: st.DataObject) -> None:
    limit = data.draw(st.integers(0, len(text) - 1))
    cut = safe_cut(text, limit)
    assert 0 <= cut <= limit
    assert cut in clusters(text)
    if cut:
        run = regex.search(r"(?r)[^\s。]*", text, 0, cut)[0] + regex.match(r"[^\s。]*", text[cut:])[0]
        is_border = bool(regex.search(r"[\s。]", text[cut - 1 : cut + 1]))
        assert is_border or not regex.search(r"[a-z]", run)


@given(st.lists(st.sampled_from(["word", "x.y@z", "naïve"]), min_size=2, max_size=20), st.data())
def test_the_cut_is_the_last_one_there_is(words: list[str], data: st.DataObject) -> None:
    text = " ".join(words)
    limit = data.draw(st.integers(0, len(text) - 1))
    borders = [at for at in range(1, limit + 1) if " " in text[at - 1 : at + 1]]
    assert safe_cut(text, limit) == max(borders, default=0)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n", 0),
        ("one", 1),
        ("a@b.example/c?d", 1),
        (" one  two", 2),
        ("猫です", 3),
        ("用iPhone。", 2),
    ],
)
def test_words_are_what_blanks_part_and_letters_where_there_are_none(text: str, count: int) -> None:
    assert has_words(text, count)
    assert not has_words(text, count + 1)
