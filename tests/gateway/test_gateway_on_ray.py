"""Real Envoy and the picker in front of two replicas of the Serve application: who is picked is who serves.

One Ray for the file, and one pool; test_gateway.py has what does not depend on who manages replicas.
"""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from completions import (
    LONG,
    NAME,
    PREFIX,
    STALE_S,
    addresses,
    complete,
    server_of,
    text_of,
    wait_until_seen,
    with_prefix_on,
)
from fake_server import wait_until
from gateway import DROPPED, OPTIONS, PROBE_INTERVAL_S, SERVED, Gateway, address
from ray_serve import PORT, READY, RayServe, Replica
from tools import need_gateway_tools

pytestmark = pytest.mark.slow

REPLACE_S = 60  # a replica, on a busy machine; it takes 10 s on an idle one
PAUSE_S = 0.05  # between requests of the traffic during an event
RUNNING: dict[str, Any] = {**LONG, "max_tokens": 300}  # ends during a drain, also on a busy machine


class Answer(NamedTuple):
    """Of one short request in the traffic."""

    sent_s: float
    status: int
    served: str | None
    dropped: str | None  # the picker's reason, if it has refused


class Traffic(threading.Thread):
    """Asks one short thing after another, and remembers who has answered. It ends with the context."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(daemon=True)
        self._url = gateway.url
        self._is_over = threading.Event()
        self.answers: list[Answer] = []

    def __enter__(self) -> "Traffic":
        self.start()
        wait_until(lambda: len(self.answers) > 3)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join(30)
        assert not self.is_alive()

    def run(self) -> None:
        body = {"model": NAME, "prompt": PREFIX, "max_tokens": 1, "temperature": 0}
        with httpx.Client(base_url=self._url, timeout=30, verify=False) as http:
            while not self._is_over.wait(PAUSE_S):
                sent_s = time.monotonic()
                answer = http.post("/v1/completions", json=body)
                names = (answer.headers.get(name) for name in (SERVED, DROPPED))
                self.answers.append(Answer(sent_s, answer.status_code, *names))

    def failures(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    def served_by(self, replica: Replica, since_s: float, until_s: float = float("inf")) -> list[Answer]:
        return [a for a in self.answers if a.served == address(replica.url) and since_s < a.sent_s < until_s]


@pytest.fixture(scope="module")
def ray_serve(long_gemma2_dir: Path) -> Iterator[RayServe]:
    need_gateway_tools()
    options = {**OPTIONS, "model": str(long_gemma2_dir), "threads": 1, "num_replicas": 2, "num_cpus": 0.1}
    options["drain_timeout_s"] = 60
    with RayServe(**options) as one:
        answer = one.deploy()
        assert answer == READY, f"{answer}\n{one.output()[-4000:]}"
        yield one


@pytest.fixture(scope="module")
def gateway(ray_serve: RayServe) -> Iterator[Gateway]:
    urls = [f"http://127.0.0.1:{PORT + index}" for index in range(2)]
    with Gateway(*urls, probe_interval_s=PROBE_INTERVAL_S, queue_ttl_s=3) as one:
        yield one


@pytest.fixture
def pair(ray_serve: RayServe, gateway: Gateway) -> Iterator[list[Replica]]:
    """Both are in the pool, ready and idle, and Serve has no more to do."""
    ray_serve.settle()
    with Replica(0) as one, Replica(1) as other:
        for replica in (one, other):
            wait_until(lambda replica=replica: replica.health() == 200, REPLACE_S)
            wait_until(lambda replica=replica: replica.metric("num_requests_running") == 0, 30)
        wait_until_seen(gateway, one, other)
        yield [one, other]


def events_of(http: httpx.Client) -> tuple[list[str], list[float]]:
    """The text of each event of a stream, without what differs between two, and when it came."""
    body = {"model": NAME, "prompt": "hello", "max_tokens": 200, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    texts, times_s = [], []
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                texts.append(re.sub(r'"(id|created)":[^,]+', "", line))
                times_s.append(time.monotonic())
    return texts, times_s


def test_a_stream_passes_untouched_and_a_client_that_leaves_ends_its_request(
    gateway: Gateway, pair: list[Replica]
) -> None:
    through, times_s = events_of(gateway.http)
    assert through == events_of(pair[0].http)[0]
    assert through[-1] == "data: [DONE]"
    assert times_s[-1] - times_s[0] > 0.1, "events come one by one, not at the end"
    with gateway.client() as client:
        stream = complete(client, stream=True, **LONG)
        next(stream)
        (replica,) = [one for one in pair if address(one.url) == stream.response.headers[SERVED]]
        assert replica.metric("num_requests_running") == 1
        stream.close()
        wait_until(lambda: replica.metric("num_requests_running") == 0, 5)


def test_load_on_one_replica_sends_requests_to_the_other(gateway: Gateway, pair: list[Replica]) -> None:
    busy, free = pair
    with busy.client() as direct, gateway.client() as client, ThreadPoolExecutor() as threads:
        running = [complete(direct, stream=True, **LONG) for _ in range(2)]
        waiting = [threads.submit(complete, direct, stream=True, **LONG) for _ in range(2)]
        wait_until(lambda: busy.metric("num_requests_waiting") == 2)
        time.sleep(STALE_S)
        before = free.metric("generation_tokens_total")
        assert {server_of(client) for _ in range(8)} == {address(free.url)}
        assert free.metric("generation_tokens_total") == before + 8, "who was picked has served"
        assert busy.metric("num_requests_waiting") == 2, "the load must outlast the requests"
        for stream in running:
            stream.close()
        for future in waiting:
            future.result().close()


def test_a_prefix_returns_to_the_replica_that_has_its_pages(gateway: Gateway, pair: list[Replica]) -> None:
    with gateway.client() as client:
        first = server_of(client, PREFIX)
        for question in ("who?", "what?", "why?"):
            raw = client.completions.with_raw_response.create(
                model=NAME, prompt=PREFIX + question, max_tokens=1
            )
            assert raw.headers[SERVED] == first
            usage = raw.parse().usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens > 500
        wait_until(lambda: {server_of(client) for _ in range(2)} == set(addresses(pair)))


def test_a_killed_engine_gets_nothing_new_until_serve_has_replaced_it(
    ray_serve: RayServe, gateway: Gateway, pair: list[Replica], capsys: pytest.CaptureFixture[str]
) -> None:
    dying, other = pair
    with gateway.client() as client:
        with_prefix_on(gateway, client, dying, [other])
        stream = complete(client, PREFIX, stream=True, **LONG)
        assert stream.response.headers[SERVED] == address(dying.url)
        with Traffic(gateway) as traffic:
            ray_serve.engine(0).kill()
            killed_s = time.monotonic()
            with pytest.raises(openai.APIError):
                text_of(stream)
            wait_until(lambda: dying.health() == 0, 20)  # its process has ended
            wait_until(lambda: dying.health() == 200, REPLACE_S)
            ready_s = time.monotonic()
            wait_until(lambda: traffic.served_by(dying, ready_s), 10)
    assert all(failed.sent_s < killed_s + STALE_S for failed in traffic.failures())
    assert not traffic.served_by(dying, killed_s + STALE_S, ready_s - PROBE_INTERVAL_S)
    with capsys.disabled():
        failed, asked = len(traffic.failures()), len(traffic.answers)
        print(f"\nengine killed: {failed} of {asked} failed, back after {ready_s - killed_s:.1f} s")


def test_replicas_are_replaced_one_by_one_and_no_client_notices(
    ray_serve: RayServe, gateway: Gateway, pair: list[Replica]
) -> None:
    old = [ray_serve.replica(index).pid for index in range(2)]
    with gateway.client() as client, ThreadPoolExecutor() as threads, Traffic(gateway) as traffic:
        streams = [threads.submit(list, complete(client, stream=True, **RUNNING)) for _ in range(2)]
        ray_serve.start_deploy()
        wait_until(lambda: any(replica.health() != 200 for replica in pair), 20)
        first, second = sorted(pair, key=lambda replica: replica.health() == 200)
        left_s = time.monotonic() + 2 * PROBE_INTERVAL_S
        wait_until(lambda: first.health() == 200, REPLACE_S)
        back_s = time.monotonic()
        assert second.health() == 200
        wait_until(lambda: second.health() != 200, 20)
        assert time.monotonic() - back_s > PROBE_INTERVAL_S, "the pool must see the new one first"
        answer = ray_serve.end_deploy()
        assert answer == READY, answer
        assert {server_of(client) for _ in range(8)} == set(addresses(pair))
        assert [one.result()[-1].choices[0].finish_reason for one in streams] == ["length"] * 2
    assert not traffic.failures()
    assert not traffic.served_by(first, left_s, back_s - PROBE_INTERVAL_S)
    assert {ray_serve.replica(index).pid for index in range(2)}.isdisjoint(old)


def test_an_update_while_a_replica_starts_takes_no_port_from_the_node(
    ray_serve: RayServe, pair: list[Replica]
) -> None:
    """Serve kills a replica that it does not count yet, and forgets that replica's port."""
    old = [ray_serve.replica(index).pid for index in range(2)]
    ray_serve.engine(0).kill()
    wait_until(lambda: pair[0].health() == 0, 20)
    wait_until(lambda: pair[0].health() == 200, REPLACE_S)
    started = ray_serve.replica(0).pid
    answer = ray_serve.deploy()
    assert answer == READY, answer
    assert [replica.health() for replica in pair] == [200, 200]
    assert {ray_serve.replica(index).pid for index in range(2)}.isdisjoint([*old, started])
    assert f"port given back port={PORT}" in ray_serve.output()
