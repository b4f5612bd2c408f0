"""Scores worked out by hand, and the picks that follow from them."""

import pytest

from cabochon.server.gateway.endpoint_metrics import EndpointMetrics
from cabochon.server.gateway.scheduling import (
    Pool,
    Request,
    Scheduler,
    Weights,
    kv_scores,
    lora_scores,
    open_endpoints,
    prefix_scores,
    queue_scores,
    saturation,
)

NOW_S = 100.0
PROMPT = b"x" * 600  # chunks of 256, 256 and 88 bytes


def seen(**fields: object) -> EndpointMetrics:
    """An endpoint whose metrics are 50 ms old."""
    return EndpointMetrics(**{"updated_s": NOW_S - 0.05, **fields})


def request(*prompts: bytes, model: str = "demo", salt: str = "") -> Request:
    return Request(model=model, prompts=prompts, salt=salt)


def picks(scheduler: Scheduler, pool: Pool, num: int, asked: Request | None = None) -> list[str]:
    return [scheduler.pick(asked or request(), pool, NOW_S) for _ in range(num)]


def test_queues_are_scored_between_the_shortest_and_the_longest() -> None:
    pool = {"a": seen(waiting=2), "b": seen(waiting=6), "c": seen(waiting=5), "d": EndpointMetrics()}
    assert queue_scores(pool) == {"a": 1.0, "b": 0.0, "c": 0.25}


def test_equal_queues_are_all_the_best() -> None:
    assert queue_scores({"a": seen(waiting=7), "b": seen(waiting=7)}) == {"a": 1.0, "b": 1.0}
    assert queue_scores({"a": EndpointMetrics()}) == {}


def test_the_free_share_of_memory_is_its_score() -> None:
    pool = {"a": seen(kv_usage=0.25), "b": seen(kv_usage=1.0), "c": EndpointMetrics()}
    assert kv_scores(pool) == {"a": 0.75, "b": 0.0}


def test_the_share_of_known_chunks_is_the_score_of_a_prefix() -> None:
    assert prefix_scores({"a": 1, "b": 4}, 4) == {"a": 0.25, "b": 1.0}
    assert prefix_scores({}, 0) == {}


@pytest.mark.parametrize(
    ("active", "waiting", "max_adapters", "score"),
    [
        ({"red"}, {}, 1, 1.0),  # there, though no slot is free
        ({"red", "blue"}, {}, 2, 1.0),
        ({"blue"}, {}, 2, 0.8),
        ({}, {}, 1, 0.8),
        ({"blue"}, {"red"}, 3, 0.8),  # waits, but a slot is free: that counts first
        ({"blue"}, {"red"}, 2, 0.6),
        ({"blue"}, {"green"}, 2, 0.0),
        ({"blue"}, {}, 1, 0.0),
        ({}, {}, 0, 0.0),  # serves no adapters
    ],
)
def test_lora_affinity_is_there_then_free_then_waiting_then_full(
    active: set[str], waiting: set[str], max_adapters: int, score: float
) -> None:
    metrics = seen(
        active_adapters=frozenset(active), waiting_adapters=frozenset(waiting), max_adapters=max_adapters
    )
    assert lora_scores({"a": metrics}, "red") == {"a": score}


def test_saturation_is_the_mean_of_the_scarcer_resource() -> None:
    pool = {"a": seen(waiting=10, kv_usage=0.4), "b": seen(waiting=1, kv_usage=0.4)}
    assert saturation(pool, NOW_S) == pytest.approx((2.0 + 0.5) / 2)


def test_a_stale_endpoint_counts_as_exactly_full_and_an_empty_pool_too() -> None:
    stale = seen(updated_s=NOW_S - 0.21, waiting=0)
    assert saturation({"a": stale, "b": seen()}, NOW_S) == 0.5
    assert saturation({"a": stale, "b": EndpointMetrics()}, NOW_S) == 1.0
    assert saturation({}, NOW_S) == 1.0


def test_stale_and_full_endpoints_are_left_out_unless_none_is_left() -> None:
    closed = {
        "stale": seen(updated_s=NOW_S - 0.21),
        "never": EndpointMetrics(),
        "queue": seen(waiting=5),
        "memory": seen(kv_usage=0.8),
    }
    free = seen(waiting=4, kv_usage=0.79)
    assert open_endpoints({**closed, "free": free}, NOW_S) == {"free": free}
    assert open_endpoints(closed, NOW_S) == closed


def test_equal_endpoints_take_turns() -> None:
    pool = {"a": seen(), "b": seen(), "c": seen()}
    assert picks(Scheduler(), pool, 6) == ["a", "b", "c", "a", "b", "c"]


def test_the_shorter_queue_is_picked() -> None:
    assert picks(Scheduler(), {"a": seen(waiting=1), "b": seen(waiting=0)}, 3) == ["b"] * 3


def test_the_freer_memory_is_picked() -> None:
    assert picks(Scheduler(), {"a": seen(kv_usage=0.5), "b": seen(kv_usage=0.4)}, 3) == ["b"] * 3


def test_a_prefix_returns_to_where_it_was_sent() -> None:
    scheduler, pool = Scheduler(), {"a": seen(), "b": seen(), "c": seen()}
    first = scheduler.pick(request(PROMPT), pool, NOW_S)
    assert picks(scheduler, pool, 4, request(PROMPT + b" and more")) == [first] * 4


@pytest.mark.parametrize(
    "other", [request(PROMPT, model="red"), request(PROMPT, salt="tenant"), request(b"y" + PROMPT)]
)
def test_another_model_salt_or_start_is_another_prefix(other: Request) -> None:
    scheduler, pool = Scheduler(), {"a": seen(), "b": seen()}
    scheduler.pick(request(PROMPT), pool, NOW_S)
    assert scheduler.pick(other, pool, NOW_S) == "b"


def test_a_whole_prefix_outweighs_a_longer_queue_and_a_part_of_it_does_not() -> None:
    scheduler = Scheduler()
    scheduler.pick(request(PROMPT), {"a": seen()}, NOW_S)
    pool = {"a": seen(waiting=1), "b": seen()}
    assert scheduler.pick(request(PROMPT), pool, NOW_S) == "a"  # 3 · 1 against 2 · 1
    half = request(PROMPT[:512] + b"z" * 512)
    assert scheduler.pick(half, pool, NOW_S) == "b"  # 3 · 1/2 against 2 · 1


def test_no_prefix_brings_a_request_to_a_full_endpoint() -> None:
    scheduler = Scheduler()
    scheduler.pick(request(PROMPT), {"a": seen()}, NOW_S)
    assert scheduler.pick(request(PROMPT), {"a": seen(waiting=5), "b": seen()}, NOW_S) == "b"


def test_prompts_of_a_batch_are_matched_one_by_one() -> None:
    scheduler = Scheduler()
    scheduler.pick(request(b"first" * 60), {"a": seen()}, NOW_S)
    scheduler.pick(request(b"second" * 60), {"b": seen()}, NOW_S)
    pool = {"a": seen(), "b": seen(), "c": seen()}
    assert scheduler.pick(request(b"second" * 60, b"second" * 60, b"first" * 60), pool, NOW_S) == "b"


def test_weights_decide_which_scorer_counts() -> None:
    pool = {
        "a": seen(waiting=1, active_adapters=frozenset({"red"}), max_adapters=1),
        "b": seen(max_adapters=1),
    }
    asked = request(model="red")
    assert Scheduler().pick(asked, pool, NOW_S) == "b"  # the default profile knows no adapters
    assert Scheduler(Weights(lora=11)).pick(asked, pool, NOW_S) == "a"  # 11 · 0.2 against 2 · 1
    assert Scheduler(Weights(lora=9)).pick(asked, pool, NOW_S) == "b"  # 9 · 0.2


def test_adapters_go_where_they_are_then_where_there_is_room() -> None:
    def with_adapters(*names: str) -> EndpointMetrics:
        return seen(active_adapters=frozenset(names), max_adapters=2)

    scheduler = Scheduler(Weights(lora=3))
    pool = {
        "a": with_adapters("blue", "green"),
        "b": with_adapters("red", "blue"),
        "c": with_adapters("blue"),
    }
    assert scheduler.pick(request(model="red"), pool, NOW_S) == "b"
    assert scheduler.pick(request(model="new"), pool, NOW_S) == "c"
    assert picks(scheduler, {"a": pool["a"], "b": pool["b"]}, 2, request(model="new")) == ["a", "b"]
