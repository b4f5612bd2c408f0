"""Nothing leaves that was not approved: any text, any pieces, any delays, in virtual time."""

import asyncio
import re
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import regex
import virtual_clock
from guarded_choice import BANNED, EMAIL, HOLD_BACK, UNSPLIT, World
from hypothesis import given, settings

from cabochon.engine.errors import ConfigError
from cabochon.engine.messages import TokenLogprobs
from cabochon.server.armor import response_guard
from cabochon.server.armor.response_guard import Blocked, Windows, guarded
from cabochon.server.armor.safe_cut import MAX_RUN, safe_cut
from cabochon.server.generation import Delta

PARTS = [
    "alpha",
    "b",
    "naïve",
    "日本",
    "。",
    "👩‍👩‍👧",
    "e\u0301",
    "🇩🇪",
    "\r\n",
    " ",
    "a@b.example",
    "x.y.z@mail.example",
]
PLAIN = [part for part in PARTS if "@" not in part]
DELAYS = st.sampled_from([0.0, 0.0, 0.01, 0.3, 3.0])

WINDOWS = st.builds(
    Windows,
    first_chars=st.sampled_from([1, 7, 16]),
    max_chars=st.sampled_from([16, 60]),
    hold_back_chars=st.just(HOLD_BACK),
    context_chars=st.sampled_from([0, 1, 40]),
    max_hold_s=st.sampled_from([0.02, 2.0]),
    pressure=st.sampled_from([lambda: 0.0, lambda: 1.0]),
)
WORLDS = {
    "sizes": st.lists(st.sampled_from([1, 1, 3, 7, 40, 300]), min_size=1, max_size=5),
    "delays_s": st.lists(DELAYS, min_size=1, max_size=5),
    "check_s": st.lists(DELAYS, min_size=1, max_size=5),
    "windows": WINDOWS,
    "reads_s": st.sampled_from([0.0, 0.0, 0.01, 0.4]),
}
SPACED = st.lists(st.sampled_from(PARTS), max_size=60).map(" ".join)
WORDS = SPACED.map(lambda text: text.replace("日本", "x"))
TIGHT = st.lists(st.sampled_from(PLAIN), max_size=60).map("".join)


def clusters(text: str) -> set[int]:
    return {0} | {found.end() for found in regex.finditer(r"\X", text)}


def lengths(world: World) -> list[int]:
    """Of all that was said, after each delta."""
    total = [0]
    for delta in world.shown:
        total.append(total[-1] + len(delta.text))
    return total


@settings(max_examples=80, deadline=None)
@given(st.builds(World, text=SPACED, mode=st.sampled_from(["window", "strict"]), **WORLDS))
def test_an_answer_that_nothing_blocks_is_said_whole_as_it_was_approved(world: World) -> None:
    world.run().check_end("length")
    assert world.said() == EMAIL.sub("[EMAIL]", world.text)


@settings(max_examples=80, deadline=None)
@given(
    st.builds(World, text=st.one_of(SPACED, TIGHT), mode=st.sampled_from(["window", "strict"]), **WORLDS),
    st.one_of(SPACED, TIGHT),
    st.sampled_from(["", " "]),
)
def test_of_a_blocked_answer_nothing_leaves_from_the_banned_words_on(
    world: World, more: str, glue: str
) -> None:
    allowed = EMAIL.sub("[EMAIL]", world.text + glue)
    world.text += glue + BANNED + glue + more
    world.run().check_end("content_filter")
    assert allowed.startswith(world.said())
    assert world.shown[-1].text == ""
    assert world.mode == "window" or len(world.shown) == 1


@settings(max_examples=50, deadline=None)
@given(st.builds(World, text=TIGHT, **WORLDS))
def test_no_release_ends_within_a_character(world: World) -> None:
    world.run().check_end("length")
    assert world.said() == world.text
    assert set(lengths(world)) <= clusters(world.text)


@settings(max_examples=50, deadline=None)
@given(st.builds(World, text=WORDS, rewrite=st.just(str), **WORLDS))
def test_no_release_ends_within_a_word(world: World) -> None:
    world.run().check_end("length")
    assert world.said() == world.text
    ends = lengths(world)[1:-1]
    assert all(re.search(r"[\s。]", world.text[at - 1 : at + 1]) for at in ends)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(World, text=SPACED, mode=st.just("optimistic"), rewrite=st.just(str), **WORLDS), st.booleans()
)
def test_optimistic_shows_at_once_and_ends_late(world: World, is_bad: bool) -> None:
    if is_bad:
        world.text += BANNED + world.text
    world.run().check_end("content_filter" if is_bad else "length")
    assert world.text.startswith(world.said())
    assert is_bad or world.said() == world.text
    assert is_bad or world.reads_s or max(world.holds_s, default=0.0) == 0.0


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        World,
        text=SPACED.map(lambda text: "one two " + text),
        mode=st.sampled_from(["window", "strict", "optimistic"]),
        rewrite=st.just(str),
        **WORLDS,
    ),
    st.integers(0, 12),
    st.booleans(),
)
def test_after_an_error_nothing_is_said(world: World, number: int, is_of_check: bool) -> None:
    whole = replace(world, shown=[], times_s=[], checks=[], holds_s=[]).run()
    if is_of_check:
        world.check_fails_at = number % len(whole.checks)
    else:
        world.fails_at = number % (whole.num_generated // 2)
    with pytest.raises(ConnectionError if is_of_check else RuntimeError):
        world.run()
    world.check_books()
    assert world.text.startswith(world.said())
    assert all(delta.finish_reason is None for delta in world.shown)
    if world.mode != "optimistic":
        assert len(world.said()) <= sum(len(text) for _, _, text in world.checks)
    assert len(world.checks) == number % len(whole.checks) + 1 or not is_of_check


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        World, text=SPACED, rewrite=st.just(str), scored=st.just(True),
        behind=st.lists(st.booleans(), min_size=1, max_size=4),
        mode=st.sampled_from(["window", "strict", "optimistic"]), **WORLDS,
    )
)  # fmt: skip
def test_log_probabilities_never_lead_the_text(world: World) -> None:
    world.run().check_end("length")
    ends, at = [], 0  # per token, where its piece ends
    num_pieces = world.num_generated // 2
    for number in range(num_pieces):
        at = min(len(world.text), at + world.sizes[number % len(world.sizes)])
        ends.append(at)
    behind = [world.behind[number % len(world.behind)] for number in range(num_pieces)]
    visible = [
        next((ends[later] for later in range(number, num_pieces) if not behind[later]), None)
        for number in range(num_pieces)
    ]
    tokens: list[int] = []
    for delta, length in zip(world.shown, lengths(world)[1:], strict=True):
        if delta.scored is not None:
            tokens += delta.scored.token_ids
            assert delta.scored.logprobs == [TokenLogprobs(-1.0, [], [])] * len(delta.scored.token_ids)
        assert all(visible[token] is not None and visible[token] <= length for token in tokens)
    assert tokens == [number for number in range(num_pieces) if visible[number] is not None]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_phrase_as_long_as_the_hold_back_never_leaves_in_part(size: int) -> None:
    """At every place, so over every border of windows."""
    for offset in range(150):
        before = "ab " * (offset // 3) + " " * (offset % 3)
        world = World(before + BANNED + " and on" * 20, sizes=[size], check_s=[0.03]).run()
        world.check_end("content_filter")
        assert before.startswith(world.said()), offset


@pytest.mark.parametrize("check_s", [0.0, 0.05, 1.0])
def test_an_address_at_any_place_is_rewritten_whole(check_s: float) -> None:
    for offset in range(80):
        text = "ab " * (offset // 3) + " " * (offset % 3) + "some.one@mail.example" + " and on" * 12
        world = World(text, sizes=[2], check_s=[check_s]).run()
        world.check_end("length")
        assert world.said() == EMAIL.sub("[EMAIL]", text), offset


def test_an_address_longer_than_the_hold_back_is_not_split() -> None:
    text = "go to " + "a" * 90 + "@example now, and then on and on"
    world = World(text, sizes=[3]).run()
    assert world.said() == EMAIL.sub("[EMAIL]", text)


def test_a_rewrite_drops_log_probabilities_from_then_on() -> None:
    text = "all of this is fine, it goes on and on " * 3 + "a@b.example" + " and so on" * 20
    world = World(text, scored=True).run()
    assert world.said() == EMAIL.sub("[EMAIL]", text)
    has_scored = [delta.scored is not None for delta in world.shown]
    assert has_scored[0]
    first = next(number for number, delta in enumerate(world.shown) if "[EMAIL]" in delta.text)
    assert not any(has_scored[first:])


def test_a_rewrite_of_the_whole_answer_is_released_at_the_end() -> None:
    world = World("one two three " * 20, rewrite=lambda _: "[GONE]").run()
    assert (world.said(), len(world.shown)) == ("[GONE]", 1)
    world.check_end("length")


def test_a_rewrite_that_goes_on_into_the_tail_waits_for_more_and_asks_seldom() -> None:
    world = World("a@b.example " * 100, sizes=[1]).run()
    assert world.said() == "[EMAIL] " * 100
    assert len(world.checks) <= 12


def test_optimistic_takes_a_rewrite_for_a_block() -> None:
    world = World("one two a@b.example" + " and on" * 40, mode="optimistic").run()
    world.check_end("content_filter")
    assert world.text.startswith(world.said())
    assert len(world.said()) < len(world.text)


@pytest.mark.parametrize(
    ("delay_s", "check_s", "reads_s", "num_said"), [(0.01, 0.01, 0.0, 40), (0.001, 0.005, 0.0105, 55)]
)
def test_optimistic_says_nothing_after_a_block(
    delay_s: float, check_s: float, reads_s: float, num_said: int
) -> None:
    """Not even what came at the same time, nor if more comes before the reader has dealt with the last."""
    world = World("one two three " + BANNED + " and on" * 400, mode="optimistic", check_s=[check_s])
    world = replace(world, delays_s=[delay_s], reads_s=reads_s).run()
    world.check_end("content_filter")
    assert world.said() == world.text[:num_said]
    assert len(world.checks) == 1


def test_off_touches_nothing() -> None:
    world = World("one a@b.example", mode="off", scored=True, behind=[True])

    async def both() -> list[Delta]:
        await world.all()
        return [delta async for delta in world.source()]

    assert virtual_clock.run(both()) == world.shown
    assert (world.checks, world.num_left) == ([], 0)


@pytest.mark.parametrize("mode", ["strict", "window", "optimistic"])
def test_an_empty_answer_needs_no_check(mode: str) -> None:
    world = World("", mode=mode).run()
    world.check_end("length")
    assert (len(world.shown), world.checks) == (1, [])


def test_strict_checks_once_at_the_end() -> None:
    world = World("one two three " * 400, sizes=[9], mode="strict").run()
    assert [text for _, _, text in world.checks] == [world.text]
    assert len(world.shown) == 1
    assert world.holds_s == [pytest.approx(world.times_s[0] - 0.01)]


def test_windows_grow_and_overlap_and_show_what_was_released_before() -> None:
    windows = Windows(first_chars=30, max_chars=100, hold_back_chars=20, context_chars=12, max_hold_s=99)
    world = World("abcd " * 200, sizes=[5], windows=windows).run()
    sizes = [len(text) for _, _, text in world.checks]
    assert sizes[:3] == [50, 80, 120]
    assert set(sizes[3:-1]) == {120}
    released = 0
    for _, context, text in world.checks:
        assert context == world.text[max(0, released - 12) : released]
        assert world.text[released:].startswith(text)
        released += len(text) - 20


def test_under_pressure_windows_are_wider_and_fewer() -> None:
    def num_checks(pressure: float) -> int:
        windows = Windows(
            first_chars=30, max_chars=60, wide_chars=400, hold_back_chars=20, pressure=lambda: pressure
        )
        return len(World("abcd " * 400, windows=windows).run().checks)

    assert num_checks(0.0) > 2 * num_checks(0.5) > 2 * num_checks(1.0)
    assert num_checks(9.0) == num_checks(1.0)


def test_text_waits_no_longer_than_the_longest_hold() -> None:
    windows = Windows(first_chars=1000, max_chars=1000, hold_back_chars=10, max_hold_s=2.0)
    world = World("abcd " * 30, sizes=[5], delays_s=[0.5], check_s=[0.2], windows=windows).run()
    assert [at for at, _, _ in world.checks[:4]] == [2.5, 4.5, 6.5, 8.5]  # the first piece came at 0.5
    assert world.times_s[:2] == [2.7, 4.7]
    assert max(world.holds_s) <= 4.3
    assert world.said() == world.text


def test_nor_is_a_text_checked_again_that_has_not_grown() -> None:
    windows = Windows(first_chars=1000, max_chars=1000, hold_back_chars=10, max_hold_s=2.0)
    world = World("one two three four five", sizes=[20], delays_s=[0.5, 99.0], windows=windows).run()
    assert [at for at, _, _ in world.checks] == [2.5, 99.5]


def test_two_words_wait_for_a_third() -> None:
    windows = Windows(first_chars=5, max_chars=5, hold_back_chars=5, max_hold_s=0.1)
    world = World(
        "abcdefghijklmno bcdefghijklmnopqrstuvwxyz x and so on", sizes=[3], delays_s=[1.0], windows=windows
    )
    world.run()
    assert world.said() == world.text
    assert len(world.checks[0][2].split()) >= 3


@pytest.mark.parametrize(
    "text",
    [
        "我们今天去公园散步" * 40,
        "我用iPhone打电话、因为今天天气很好。" * 20,
        "猫が好きです。" * 40,
        "a" * 6000,
        "ก็นั่นแหละ" * 40,
    ],
)
def test_text_without_blanks_streams(text: str) -> None:
    world = World(text, sizes=[4]).run()
    assert world.said() == text
    assert len(world.shown) > 2
    assert len(world.shown[0].text) < (MAX_RUN + 100 if text[0] == "a" else 100)


@pytest.mark.parametrize("unit", UNSPLIT)
def test_text_that_has_no_place_to_cut_streams_in_bounded_work(unit: str) -> None:
    world = World(unit * 5000, sizes=[16])
    world.text = world.text[:5000]
    begin_s = time.thread_time()
    world.run()
    used_s = time.thread_time() - begin_s
    assert world.said() == world.text
    assert len(world.shown) > 2
    assert len(world.shown[0].text) <= MAX_RUN + 17
    assert used_s < 0.5


def test_it_is_looked_at_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def count(text: str, limit: int) -> int:
        looks.append(len(text))
        return safe_cut(text, limit)

    monkeypatch.setattr(response_guard, "safe_cut", count)
    text = "\u0600 \u0301" * 4000
    assert World(text, sizes=[1]).run().said() == text
    assert sum(looks) < 8 * len(text)


@pytest.mark.parametrize("late_end_s", [None, 0.05, 1.0])
def test_what_was_approved_is_not_checked_again_when_no_more_comes(late_end_s: float | None) -> None:
    text = "one two three four five six seven eight"
    windows = Windows(first_chars=4, max_chars=9, hold_back_chars=8)
    world = World(text, sizes=[len(text)], check_s=[0.1], windows=windows, late_end_s=late_end_s).run()
    world.check_end("length")
    assert (world.said(), len(world.checks)) == (text, 1)


@pytest.mark.parametrize("late_end_s", [None, 0.05, 1.0])
def test_what_was_rewritten_in_the_tail_is_not_said_when_no_more_comes(late_end_s: float | None) -> None:
    text = "one two three four five six a@b.example"
    windows = Windows(first_chars=4, max_chars=9, hold_back_chars=8)
    world = World(text, sizes=[len(text)], check_s=[0.1], windows=windows, late_end_s=late_end_s).run()
    world.check_end("length")
    assert world.said() == "one two three four five six [EMAIL]"


@settings(max_examples=40, deadline=None)
@given(
    st.builds(World, text=SPACED, mode=st.sampled_from(["window", "strict", "optimistic", "off"]), **WORLDS),
    st.integers(1, 5),
)
def test_whoever_closes_it_closes_the_source_and_the_check(world: World, until: int) -> None:
    world.run(until).check_books()


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.5, 1.2])
def test_whoever_is_cancelled_cancels_the_source_and_the_check(after_s: float) -> None:
    world = World("one two three " * 40, sizes=[100], delays_s=[0.3], check_s=[0.7])

    async def cancel() -> None:
        task = asyncio.create_task(world.all())
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        world.num_left = len(asyncio.all_tasks()) - 1

    virtual_clock.run(cancel())
    world.check_books()


def test_an_error_of_the_source_does_not_wait_for_a_check() -> None:
    world = World("one two three " * 40, sizes=[100], delays_s=[0.3], check_s=[50.0], fails_at=2)

    async def time_of_end() -> float:
        with pytest.raises(RuntimeError, match="engine died"):
            await world.all()
        return world.now()

    assert virtual_clock.run(time_of_end()) == pytest.approx(0.9)
    assert world.shown == []
    world.check_books()


def test_a_block_closes_the_source_before_it_is_told() -> None:
    world = World(BANNED + " and on" * 40, delays_s=[1.0])

    async def until_the_end() -> None:
        async with aclosing(
            guarded(world.source(), world.approve, mode="window", windows=world.windows)
        ) as deltas:
            async for delta in deltas:
                assert delta.finish_reason == "content_filter"
                assert world.is_closed

    virtual_clock.run(until_the_end())
    assert world.num_generated < 40


def test_a_block_names_its_filters_and_nothing_else() -> None:
    assert Blocked(("rai:dangerous", "csam")).filters == ("rai:dangerous", "csam")


@pytest.mark.parametrize(
    "fields",
    [
        {"first_chars": 0}, {"first_chars": 9, "max_chars": 8}, {"hold_back_chars": 0}, {"context_chars": -1},
        {"max_hold_s": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_windows_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must"):
        Windows(**fields)
