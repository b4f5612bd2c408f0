"""The breaker opens on a share and on a row of failures, and lets one call try again."""

import pytest

from cabochon.server.armor.breaker import Breaker


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def feed(breaker: Breaker, results: str) -> None:
    """A call for each letter: o ok, f failed, . no word."""
    for letter in results:
        ticket = breaker.enter()
        assert ticket is not None
        breaker.leave(ticket, {"o": True, "f": False, ".": None}[letter])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def test_five_failures_in_a_row_open_it(breaker: Breaker) -> None:
    feed(breaker, "ffffoffff")
    assert breaker.state == "closed"
    feed(breaker, "f")
    assert breaker.state == "open"
    assert breaker.enter() is None


def test_half_of_twenty_calls_open_it(breaker: Breaker) -> None:
    feed(breaker, "of" * 9 + "o")
    assert breaker.state == "closed"
    feed(breaker, "f")
    assert breaker.state == "open"


def test_old_failures_do_not_count(breaker: Breaker, clock: Clock) -> None:
    feed(breaker, "of" * 9)
    clock.now += 10
    feed(breaker, "of" * 9)
    assert breaker.state == "closed"


def test_calls_that_say_nothing_do_not_count(breaker: Breaker) -> None:
    feed(breaker, "ff" + "." * 50 + "ff")
    assert breaker.state == "closed"
    feed(breaker, "f")
    assert breaker.state == "open"


def test_after_a_while_exactly_one_call_tries(breaker: Breaker, clock: Clock) -> None:
    feed(breaker, "fffff")
    clock.now += 4.9
    assert breaker.enter() is None
    clock.now += 0.1
    ticket = breaker.enter()
    assert ticket is not None
    assert [breaker.enter() for _ in range(3)] == [None] * 3
    breaker.leave(ticket, True)
    assert breaker.state == "closed"
    feed(breaker, "ffff")
    assert breaker.state == "closed"  # the failures before are forgotten


def test_it_tells_whether_a_call_would_be_refused_without_making_one(breaker: Breaker, clock: Clock) -> None:
    assert not breaker.refuses()
    feed(breaker, "fffff")
    assert breaker.refuses()
    clock.now += 5
    assert not breaker.refuses()
    ticket = breaker.enter()
    assert ticket is not None
    assert breaker.refuses()  # one tries
    breaker.leave(ticket, True)
    assert not breaker.refuses()


def test_a_trial_that_fails_opens_it_again(breaker: Breaker, clock: Clock) -> None:
    feed(breaker, "fffff")
    clock.now += 5
    feed(breaker, "f")
    assert breaker.enter() is None
    clock.now += 5
    feed(breaker, "o")
    assert breaker.state == "closed"


def test_a_trial_that_is_cancelled_leaves_its_place_to_the_next(breaker: Breaker, clock: Clock) -> None:
    feed(breaker, "fffff")
    clock.now += 5
    feed(breaker, "." * 3)
    feed(breaker, "o")
    assert breaker.state == "closed"


def test_what_calls_of_before_say_no_longer_counts(breaker: Breaker, clock: Clock) -> None:
    early = [breaker.enter() for _ in range(8)]
    for ticket in early[:5]:
        breaker.leave(ticket or 0, False)
    assert breaker.state == "open"
    clock.now += 5
    trial = breaker.enter()
    breaker.leave(early[5] or 0, True)
    breaker.leave(early[6] or 0, False)
    assert breaker.state == "half open"
    assert trial is not None
    breaker.leave(trial, True)
    breaker.leave(early[7] or 0, False)
    assert breaker.state == "closed"
