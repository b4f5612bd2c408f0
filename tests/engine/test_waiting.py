"""The waiting queue beside sorted()."""

import random

import numpy as np
import pytest

from cabochon.engine.messages import GenerateRequest
from cabochon.engine.request import Request
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.waiting import WaitingQueue


def waiting_request(arrival_idx: int, length: int = 1, priority: int = 0) -> Request:
    message = GenerateRequest(
        request_id=f"{arrival_idx}", prompt_ids=[2] * length, params=SamplingParams(), priority=priority
    )
    return Request(message, arrival_idx, 1, frozenset(), np.full(length, 2, np.int32))


def test_both_orders_within_each_priority() -> None:
    queue = WaitingQueue()
    a, b, c, d = (waiting_request(*of) for of in ((0, 9, 1), (1, 5, 1), (2, 9, 0), (3, 5, 1)))
    for request in (d, b, c, a):
        queue.add(request)
    assert queue.priorities == [0, 1]
    assert queue.by_arrival(1) == [a, b, d]
    assert queue.by_length(1) == [b, d, a]
    assert list(queue) == [c, a, b, d]
    assert (len(queue), queue.num_tokens) == (4, 28)


def test_an_empty_priority_is_forgotten() -> None:
    queue = WaitingQueue()
    request = waiting_request(0)
    queue.add(request)
    queue.remove(request)
    assert (queue.priorities, queue.by_arrival(0), queue.by_length(0), len(queue)) == ([], [], [], 0)
    queue.check()


def test_a_request_that_is_not_there_cannot_be_removed() -> None:
    queue = WaitingQueue()
    queue.add(waiting_request(0))
    with pytest.raises(AssertionError, match="not in the queue"):
        queue.remove(waiting_request(0))


def test_lists_may_be_walked_while_requests_leave() -> None:
    queue = WaitingQueue()
    for arrival_idx in range(4):
        queue.add(waiting_request(arrival_idx))
    for request in queue.by_arrival(0):
        queue.remove(request)
    assert not len(queue)


def test_random_walks_agree_with_sorted() -> None:
    rng, queue, held = random.Random(0), WaitingQueue(), list[Request]()
    for arrival_idx in range(2000):
        if held and rng.random() < 0.48:
            queue.remove(held.pop(rng.randrange(len(held))))
        else:
            held.append(waiting_request(arrival_idx, rng.randrange(1, 6), rng.randrange(3)))
            queue.add(held[-1])
        queue.check()
        assert list(queue) == sorted(held, key=lambda r: r.rank)
        assert queue.num_tokens == sum(len(r.token_ids) for r in held)
