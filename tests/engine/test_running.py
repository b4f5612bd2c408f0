"""The running requests beside sorted(), and books that disagree."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from cabochon.engine.messages import GenerateRequest
from cabochon.engine.request import Request
from cabochon.engine.running import Running
from cabochon.engine.sampling_params import SamplingParams


def running_request(row: int, arrival_idx: int, priority: int = 0) -> Request:
    message = GenerateRequest(
        request_id=f"{arrival_idx}", prompt_ids=[2], params=SamplingParams(), priority=priority
    )
    return Request(message, arrival_idx, 1, frozenset(), np.array([2], np.int32), row=row)


def test_they_come_and_go_and_stay_in_order_of_rank() -> None:
    rng, running = random.Random(0), Running()
    here: list[Request] = []
    for index in range(500):
        if rng.random() < 0.6:
            free = set(range(400)) - {request.row for request in here}
            request = running_request(rng.choice(sorted(free)), index, rng.randrange(3))
            running.add(request)
            here.append(request)
        elif here:
            running.remove(here.pop(rng.randrange(len(here))))
        running.check()
        expected = sorted(here, key=lambda one: one.rank)
        assert list(running) == expected
        assert running.rows.tolist() == [request.row for request in expected]
        assert running.by_row == {request.row: request for request in here}
        assert len(running) == len(here)
        assert not here or running.worst is expected[-1]


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda running: running._requests.reverse(),
        lambda running: running._by_row.clear(),
        lambda running: running._requests.pop(),
        lambda running: running.rows.sort(),
    ],
)
def test_books_that_disagree_are_found(corrupt: Callable[[Running], object]) -> None:
    running = Running()
    for row in (3, 1, 2):
        running.add(running_request(row, 10 - row))
    running.check()
    corrupt(running)
    with pytest.raises(AssertionError):
        running.check()
