"""No minute sees more calls than the quota; prompts go before answers."""

import random
from bisect import bisect_left

import pytest

from cabochon.server.armor.quota import Quota


@pytest.mark.parametrize("busy_share", [0.99, 1.0])
@pytest.mark.parametrize(("per_min", "num_replicas"), [(1200, 1), (1200, 7), (60, 1), (10, 3), (1, 1)])
def test_no_minute_has_more_calls_than_the_share(per_min: int, num_replicas: int, busy_share: float) -> None:
    now = 0.0
    quota = Quota(per_min, num_replicas, lambda: now)
    rng = random.Random(3)
    times: list[float] = []
    while now < 200:
        now += rng.choice((0.005, 0.02, 0.07)) if rng.random() < busy_share else 20
        if quota.take("prompt"):
            times.append(now)
    busiest = max(bisect_left(times, start + 60) - i for i, start in enumerate(times))
    assert busiest <= max(1, per_min / num_replicas)
    if busy_share == 1.0:  # always somebody who asks
        assert len(times) >= 0.7 * 200 / 60 * per_min / num_replicas - 1


def test_answers_leave_a_reserve_to_prompts() -> None:
    quota = Quota(1200, clock=lambda: 0.0)
    num_windows = sum(quota.take("response") for _ in range(150))
    num_prompts = sum(quota.take("prompt") for _ in range(150))
    assert (num_windows, num_prompts) == (90, 30)
    assert not quota.take("prompt")


def test_pressure_rises_as_the_bucket_empties_and_falls_as_it_fills() -> None:
    now = 0.0
    quota = Quota(1200, clock=lambda: now)
    assert quota.pressure() == 0
    for _ in range(60):
        quota.take("prompt")
    assert quota.pressure() == 0.5
    quota.refused()
    assert quota.pressure() == 1
    assert not quota.take("prompt")
    now = 1.0
    assert quota.available() == pytest.approx(18)
    now = 1000.0
    assert quota.pressure() == 0
