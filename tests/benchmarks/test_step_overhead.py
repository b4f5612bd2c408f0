"""The benchmark of the host's share of a step runs on the engine as it is now."""

import gc
from collections.abc import Iterator

import pytest
import step_overhead


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """The benchmark settles it as the engine process does, for good."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.parametrize("churn", [0, 4])
def test_it_measures_every_step_of_the_real_host_code(churn: int) -> None:
    row = step_overhead.measure(num_running=3, steps=20, churn=churn)
    assert row["running"] == 3
    assert row["steps"] == 20
    assert 0 < row["prepare_p50_ms"] <= row["prepare_p99_ms"] < 1000
    assert 0 < row["results_p50_ms"] <= row["results_p99_ms"] < 1000
    assert row["prepare_p50_ms"] <= 1.1 * row["prepare_wall_p50_ms"]
