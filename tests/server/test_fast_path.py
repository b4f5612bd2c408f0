"""The middleware around a replica's server: probes and scrapes without the app, whatever Serve says."""

import asyncio
import threading

import httpx
import pytest
from fake_server import fake_service
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cabochon.engine.fake import FakeEngine
from cabochon.server import fast_path
from cabochon.server.fast_path import FastPath
from cabochon.server.lifecycle import Phase

PATHS = ("/metrics", "/health", "/-/healthz", "/v1/models")


class Serve:
    """Stands in for Serve's server on a replica's port: `says` is the text of its health."""

    def __init__(self) -> None:
        self.says = "success"
        self.seen: list[str] = []

    async def answer(self, request: Request) -> PlainTextResponse:
        self.seen.append(request.url.path)
        response = PlainTextResponse(self.says, 200 if self.says == "success" else 503)
        response.raw_headers += [(b"x-request-id", b"1"), (b"x-request-id", b"1")]
        return response


@pytest.fixture
def serve() -> Serve:
    return Serve()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """This process is a replica with it."""
    monkeypatch.setattr(fast_path, "replica", fast_path.Replica())
    fast_path.replica.service = fake_service(engine := FakeEngine())
    return engine


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the head's proxy."""
    monkeypatch.setattr(fast_path, "replica", fast_path.Replica())


def get(serve: Serve, path: str, root_path: str = "") -> httpx.Response:
    async def one() -> httpx.Response:
        app = FastPath(Starlette(routes=[Route("/{path:path}", serve.answer)]))
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return await client.get(path)

    return asyncio.run(one())


def test_a_healthy_replica_answers_probes_as_serve_does(serve: Serve, engine: FakeEngine) -> None:
    assert [get(serve, path).text for path in ("/health", "/-/healthz")] == ["success"] * 2
    serve.says = fast_path.DRAINING.decode()
    assert [get(serve, path).status_code for path in ("/health", "/-/healthz")] == [503, 503]
    assert set(serve.seen) == {"/-/healthz"}


def test_a_new_replica_is_healthy_before_serve_says_so(serve: Serve, engine: FakeEngine) -> None:
    serve.says = "UNHEALTHY"  # until its first check has ended, which waits for probes
    assert [get(serve, path).text for path in ("/health", "/-/healthz")] == ["success"] * 2


def test_an_engine_that_is_dead_or_drains_overrules_serve(serve: Serve, engine: FakeEngine) -> None:
    assert fast_path.replica.service is not None
    fast_path.replica.service.lifecycle.phase = Phase.LAME_DUCK
    assert get(serve, "/health").json() == {"status": "lame duck"}
    engine.die()
    for path in ("/health", "/-/healthz"):
        answer = get(serve, path)
        assert (answer.status_code, answer.json()) == (503, {"status": "engine dead"})
    assert get(serve, "/metrics").status_code == 503
    assert serve.seen == []


def test_metrics_do_not_reach_serve(serve: Serve, engine: FakeEngine) -> None:
    answer = get(serve, "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# TYPE vllm:num_requests_running gauge" in answer.text
    assert get(serve, "/root/metrics", root_path="/root").text == answer.text
    assert serve.seen == []


def test_other_paths_pass_and_have_one_request_id(serve: Serve, engine: FakeEngine) -> None:
    answer = get(serve, "/v1/models")
    assert serve.seen == ["/v1/models"]
    assert answer.headers.get_list("x-request-id") == ["1"]


def test_the_heads_proxy_keeps_its_own_health_and_has_no_metrics(serve: Serve, no_engine: None) -> None:
    assert [get(serve, path).status_code for path in PATHS] == [404, 404, 200, 200]
    assert serve.seen == ["/-/healthz", "/v1/models"]


def test_draining_is_asked_for_on_serves_loop_from_another(serve: Serve, engine: FakeEngine) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> None:
        FastPath(Starlette(routes=[Route("/-/healthz", serve.answer)]))

    async def is_draining() -> bool:
        return await asyncio.wait_for(fast_path.replica.is_draining(), 5)

    try:
        assert not asyncio.run(is_draining()), "there is no server yet"
        asyncio.run_coroutine_threadsafe(start(), loop).result(5)
        for word, expected in (("success", False), ("UNHEALTHY", False), ("DRAINING", True)):
            serve.says = word
            assert asyncio.run(is_draining()) is expected
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
