"""Who may come in, and how the server ends."""

import asyncio
import threading
from dataclasses import replace

import httpx
import pytest
from fake_server import COMPLETIONS, LiveServer, wait_until

from cabochon.engine.engine import Engine
from cabochon.engine.errors import EngineDead, Overloaded
from cabochon.engine.fake import FakeEngine
from cabochon.server.config import ServerConfig
from cabochon.server.lifecycle import Lifecycle, Phase


def lifecycle(engine: Engine | None = None, **options: float) -> Lifecycle:
    return Lifecycle(engine or FakeEngine(), ServerConfig(**options))


def test_a_predicted_wait_over_the_limit_is_refused_with_when_to_come_back(live: LiveServer) -> None:
    live.engine.snapshot = replace(live.engine.snapshot, queued_tokens=10_000, prefill_tokens_per_s=100.0)
    for stream in (True, False):
        answer = live.complete(stream=stream)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "100"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert "predicted wait must be at most 60 s, it is 100 s" in answer.json()["error"]["message"]


def test_a_wait_within_the_limit_is_admitted() -> None:
    engine = FakeEngine()
    engine.snapshot = replace(engine.snapshot, queued_tokens=5900, prefill_tokens_per_s=100.0)
    lifecycle(engine).admit(1)


def test_before_the_first_measurement_nobody_is_refused() -> None:
    engine = FakeEngine()
    engine.snapshot = replace(engine.snapshot, queued_tokens=10**9)
    lifecycle(engine).admit(1)


def test_every_choice_counts_as_an_open_request() -> None:
    one = lifecycle(max_queued_requests=4)
    with one.opened(3, 30):
        one.admit(1)
        with pytest.raises(Overloaded, match="at most 4 requests may be open, 3 are"):
            one.admit(2)
    one.admit(4)


def test_health_follows_the_phase() -> None:
    one = lifecycle()
    assert one.health() == (200, "ok")
    for phase in (Phase.LAME_DUCK, Phase.DRAINING, Phase.ENDED):
        one.phase = phase
        assert one.health() == (503, phase.value)


def test_a_dead_engine_admits_nobody() -> None:
    engine = FakeEngine()
    engine.die("it burnt")
    one = lifecycle(engine)
    assert one.health() == (503, "engine dead")
    with pytest.raises(EngineDead, match="it burnt"):
        one.admit(1)


def test_a_lame_duck_still_serves(live: LiveServer) -> None:
    live.service.lifecycle.phase = Phase.LAME_DUCK
    assert live.http.get("/health").status_code == 503
    assert live.complete(max_tokens=1).status_code == 200


def test_a_draining_server_refuses_new_requests_and_finishes_old_ones(live: LiveServer) -> None:
    live.faults.delay_s = 0.02
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(live.complete([300], max_tokens=20)))
    thread.start()
    wait_until(lambda: live.engine.open)
    drained: list[bool] = []
    drain = threading.Thread(target=lambda: drained.append(asyncio.run(live.service.lifecycle.drain())))
    drain.start()
    wait_until(lambda: live.service.lifecycle.phase is Phase.DRAINING)
    refused = httpx.post(live.url + COMPLETIONS, json={"prompt": "hello"})
    assert refused.status_code == 503
    assert "shutting down" in refused.json()["error"]["message"]
    thread.join()
    drain.join()
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"
    assert drained == [True]
    assert live.service.lifecycle.phase is Phase.ENDED


def test_a_drain_has_a_deadline() -> None:
    async def run() -> bool:
        one = lifecycle(drain_timeout_s=0.05)
        with one.opened(1, 10):
            return await one.drain()

    assert asyncio.run(run()) is False


def test_a_drain_does_not_wait_for_a_dead_engine() -> None:
    async def run() -> bool:
        engine = FakeEngine()
        engine.die()
        one = lifecycle(engine, drain_timeout_s=1000)
        with one.opened(1, 10):
            return await one.drain()

    assert asyncio.run(run()) is False


def test_a_drain_of_an_idle_server_ends_at_once() -> None:
    assert asyncio.run(lifecycle(drain_timeout_s=1000).drain())


def test_requests_that_the_last_snapshot_does_not_know_count_as_queued() -> None:
    engine = FakeEngine()
    engine.snapshot = replace(engine.snapshot, queued_tokens=0, prefill_tokens_per_s=100.0)
    one = lifecycle(engine, max_queue_wait_s=2)
    with one.opened(1, 150) as started:
        one.admit(1)
        with one.opened(1, 100), pytest.raises(Overloaded, match="predicted wait must be at most 2 s"):
            one.admit(1)
        started()
        with one.opened(1, 100):
            one.admit(1)
