"""What the engine's process asks of Python. What it does: tests/server/test_real_engine.py."""

import gc
from collections.abc import Iterator

import pytest

from cabochon.engine.process import settle_collector


@pytest.fixture
def _collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("_collector")
def test_the_objects_of_a_step_are_not_looked_at() -> None:
    settle_collector()
    assert gc.get_freeze_count() > 1000, "what is there already is permanent"
    before = gc.get_stats()[0]["collections"]
    outputs = [[index] for index in range(10_000)]  # of a step with ten times the rows that there are
    assert gc.get_stats()[0]["collections"] == before
    del outputs
