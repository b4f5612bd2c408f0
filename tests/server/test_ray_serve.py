"""Two replicas on a real local Ray: who asks a port gets its engine, and every way a replica can end."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import wait_until
from ray_serve import FAILED, PROXY_PORT, READY, RayServe, Replica
from streams import Stream

pytestmark = pytest.mark.slow

NUM_ROWS, MAX_OPEN = 4, 40
LAME_DUCK_S, DRAIN_S = 2.0, 5.0
STEP_TIMEOUT_S = 6.0
REPLACE_S = 60  # it takes 10 s on an idle machine
LONG = 6000  # tokens, which take far longer than a drain


@pytest.fixture(scope="module")
def ray_serve(long_gemma2_dir: Path) -> Iterator[RayServe]:
    """One Ray for the file: it takes 5 s to start."""
    with RayServe(
        model=str(long_gemma2_dir), dtype="fp32", kv_cache_gib=0.2, threads=1, max_seqs=NUM_ROWS,
        max_queued_requests=MAX_OPEN, lame_duck_s=LAME_DUCK_S, drain_timeout_s=DRAIN_S,
        step_timeout_s=STEP_TIMEOUT_S, num_replicas=2, num_cpus=0.1,
    ) as one:  # fmt: skip
        yield one


@pytest.fixture
def replicas(ray_serve: RayServe) -> Iterator[list[Replica]]:
    """Both are ready and idle."""
    if not ray_serve.is_deployed:
        answer = ray_serve.deploy()
        assert answer == READY, f"{answer}\n{ray_serve.output()[-4000:]}"
    with Replica(0) as one, Replica(1) as other:
        for replica in (one, other):
            wait_until(lambda replica=replica: replica.health() == 200, REPLACE_S)
            wait_until(lambda replica=replica: replica.metric("num_requests_running") == 0, 30)
        yield [one, other]


def busy(replica: Replica, num_streams: int, num_tokens: int = LONG) -> list[Stream]:
    """Open streams, as many as there are rows with first tokens."""
    streams = [Stream(replica.url, num_tokens) for _ in range(num_streams)]
    num_rows = min(num_streams, NUM_ROWS)
    wait_until(lambda: replica.metric("num_requests_waiting") == num_streams - num_rows, 30)
    wait_until(lambda: sum(bool(stream.events) for stream in streams) >= num_rows, 30)
    return streams


def end(streams: list[Stream], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    for stream in streams:
        stream.join(deadline - time.monotonic())
        assert not stream.is_alive()


def leave(streams: list[Stream]) -> None:
    """Waiting ones notice when they have their first token."""
    for stream in streams:
        stream.is_unwanted = True
    end(streams)


def test_each_port_is_one_engine(replicas: list[Replica]) -> None:
    expected = None
    for replica in replicas:
        with replica.client() as client:
            (model,) = client.models.list()
            fields: dict[str, Any] = {"model": model.id, "prompt": "hello", "max_tokens": 8, "temperature": 0}
            before = replica.metric("generation_tokens_total")
            whole = client.completions.create(**fields).choices[0].text
            chunks = list(client.completions.create(**fields, stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks) == whole
            assert replica.metric("generation_tokens_total") == before + 16
            assert expected in (None, whole)
            expected = whole
        answer = replica.http.get("/v1/models", headers={"x-request-id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"]
        assert [replica.health(path) for path in ("/health", "/-/healthz")] == [200, 200]


def test_serves_own_proxy_spreads_requests_and_has_no_metrics(replicas: list[Replica]) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{PROXY_PORT}", timeout=30) as proxy:
        assert proxy.get("/-/healthz").status_code == 200
        assert [proxy.get(path).status_code for path in ("/metrics", "/health")] == [404, 404]
        assert proxy.get("/v1/models").status_code == 200


def test_a_replica_has_not_loaded_torch(ray_serve: RayServe, replicas: list[Replica]) -> None:
    maps = Path(f"/proc/{ray_serve.replica(0).pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{ray_serve.engine(0).pid}/maps").read_text()


def test_metrics_come_at_once_while_every_row_is_busy(
    replicas: list[Replica], capsys: pytest.CaptureFixture[str]
) -> None:
    replica = replicas[0]
    streams = busy(replica, NUM_ROWS + 2)
    assert replica.metric("num_requests_waiting") == 2
    took_ms = []
    for _ in range(60):  # 20 a second, as a picker does
        started_s = time.perf_counter()
        assert replica.http.get("/metrics").status_code == 200
        took_ms.append((time.perf_counter() - started_s) * 1e3)
        time.sleep(0.05)
    assert not any(stream.is_whole for stream in streams)
    with capsys.disabled():
        p50, p98 = statistics.median(took_ms), statistics.quantiles(took_ms, n=50)[-1]
        print(f"\n/metrics under load: p50 {p50:.1f} ms, p98 {p98:.1f} ms, max {max(took_ms):.1f} ms")
    assert statistics.median(took_ms) < 50, "the picker's limit is 200 ms"
    leave(streams)


def test_a_client_that_leaves_frees_its_row(replicas: list[Replica]) -> None:
    replica = replicas[0]
    leave(busy(replica, 1))
    wait_until(lambda: replica.metric("num_requests_running") == 0, 10)


def test_too_many_requests_are_told_when_to_come_back(replicas: list[Replica]) -> None:
    replica = replicas[0]
    streams = busy(replica, MAX_OPEN)
    answer = replica.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "overloaded"
    assert replicas[1].http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    leave(streams)


def test_a_killed_engine_ends_its_streams_and_comes_back_on_its_port(
    ray_serve: RayServe, replicas: list[Replica], capsys: pytest.CaptureFixture[str]
) -> None:
    dying, other = replicas
    old = ray_serve.replica(0).pid
    streams, others = busy(dying, 32), busy(other, 2)
    ray_serve.engine(0).kill()
    killed_s = time.monotonic()
    wait_until(lambda: dying.health() != 200, 5)
    end(streams, 10)
    assert {stream.error_code for stream in streams} == {"engine_dead"}
    wait_until(lambda: dying.health() == 200, REPLACE_S)
    ready_s = time.monotonic() - killed_s
    assert ray_serve.replica(0).pid != old
    assert dying.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    num_tokens = [len(stream.events) for stream in others]
    wait_until(lambda: all(len(s.events) > n or s.is_whole for s, n in zip(others, num_tokens, strict=True)))
    leave(others)
    with capsys.disabled():
        print(f"\nengine killed under 32 streams: 32 failed, ready again after {ready_s:.1f} s")


def test_a_hung_engine_is_replaced(ray_serve: RayServe, replicas: list[Replica]) -> None:
    hanging = replicas[0]
    streams = busy(hanging, 2)
    old = ray_serve.replica(0).pid
    ray_serve.engine(0).suspend()
    end(streams, STEP_TIMEOUT_S + 10)
    assert {stream.error_code for stream in streams} == {"engine_dead"}
    assert hanging.health() != 200
    wait_until(lambda: hanging.health() == 200, REPLACE_S)
    assert ray_serve.replica(0).pid != old


def test_a_deleted_application_drains_in_three_phases(ray_serve: RayServe, replicas: list[Replica]) -> None:
    replica = replicas[0]
    short, endless = Stream(replica.url, 200), Stream(replica.url, LONG)
    wait_until(lambda: short.events and endless.events, 20)
    engine = ray_serve.engine(0)
    one = {"prompt": "a", "max_tokens": 1}
    started_s = time.monotonic()
    ray_serve.start_delete()
    wait_until(lambda: replica.health() == 503 == replica.health("/-/healthz"), 5)
    assert replica.http.post("/v1/completions", json=one).status_code == 200, "lame duck"
    assert replica.http.get("/metrics").status_code == 200
    wait_until(lambda: replica.http.post("/v1/completions", json=one).status_code == 503, LAME_DUCK_S + 3)
    assert time.monotonic() - started_s > LAME_DUCK_S
    assert endless.is_alive()
    end([short, endless], DRAIN_S + 10)
    assert time.monotonic() - started_s > LAME_DUCK_S + DRAIN_S
    assert short.is_whole
    assert endless.error_code == "engine_dead"
    ray_serve.end_delete()
    wait_until(lambda: not engine.is_running(), 10)
    assert replica.health() == 0


def test_a_wrong_option_is_said_at_once(ray_serve: RayServe) -> None:
    assert "MIN_HTTP_PORT must be 9000" in ray_serve.deploy(port=9000)
    assert ray_serve.deploy(max_seq=8).startswith(f"{FAILED}max_seq is not an option: did you mean max_seqs")
