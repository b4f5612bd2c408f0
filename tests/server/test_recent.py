"""Sliding windows of arrivals and times to first token."""

import random

import pytest

from cabochon.server.recent import NUM_SLICES, SLICE_S, Recent


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_arrivals_are_tokens_per_second_and_forgotten_after_half_a_minute() -> None:
    clock = Clock()
    recent = Recent(clock)
    for _ in range(60):
        clock.now += 1
        recent.arrived(200)
    assert recent.arrived_tokens_per_s() == pytest.approx(200, rel=0.05)
    clock.now += 15
    assert recent.arrived_tokens_per_s() == pytest.approx(200 * 11 / 26, rel=0.2)
    clock.now += 30
    assert recent.arrived_tokens_per_s() == 0


def test_a_first_burst_is_not_taken_for_a_rate() -> None:
    recent = Recent(Clock())
    recent.arrived(1000)
    assert recent.arrived_tokens_per_s() == 1000 / SLICE_S


def test_prefix_hits_are_no_demand() -> None:
    recent = Recent(Clock())
    recent.arrived(1000)
    recent.first_token(0.1, 1000, 750)
    assert recent.arrived_tokens_per_s() == 250 / SLICE_S


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_a_quantile_is_at_most_a_quarter_above_the_exact_one(quantile: float) -> None:
    draw, recent = random.Random(5), Recent(Clock())
    waits = sorted(draw.lognormvariate(-1, 1) for _ in range(1000))
    for wait_s in waits:
        recent.first_token(wait_s, 10, 0)
    exact = waits[round(quantile * 1000) - 1]
    assert exact <= recent.first_token_quantile_s(quantile) <= 1.25 * exact


def test_no_first_token_is_no_wait_and_an_endless_one_is_the_last_bound() -> None:
    clock = Clock()
    recent = Recent(clock)
    assert recent.first_token_quantile_s(0.9) == 0
    recent.first_token(1e9, 10, 0)
    assert recent.first_token_quantile_s(0.9) > 1000
    clock.now += SLICE_S * NUM_SLICES
    assert recent.first_token_quantile_s(0.9) == 0
