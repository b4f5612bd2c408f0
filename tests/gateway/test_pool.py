"""Scrapes, probes and the file of endpoints, without a network."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from picker_metrics import FULL
from pool import Endpoint, Pool, http_client

ADDRESS = "127.0.0.1:8000"
Answer = Callable[[httpx.Request], httpx.Response]


def listing(*ports: int) -> str:
    return json.dumps({"endpoints": [{"address": "127.0.0.1", "port": str(port)} for port in ports]})


def pool_of(answer: Answer, path: Path = Path("unused")) -> Pool:
    return Pool(path, httpx.AsyncClient(transport=httpx.MockTransport(answer)), probe_interval_s=0.01)


def scraped(answer: Answer, endpoint: Endpoint) -> Endpoint:
    asyncio.run(pool_of(answer).scrape(endpoint))
    return endpoint


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


def test_a_scrape_asks_for_metrics_as_the_picker_does() -> None:
    async def scrape() -> httpx.Request:
        asked = []
        client = http_client()
        client._transport = httpx.MockTransport(lambda request: asked.append(request) or httpx.Response(200))
        await Pool(Path("unused"), client, 1).scrape(Endpoint(ADDRESS))
        return asked[0]

    request = asyncio.run(scrape())
    assert (request.method, str(request.url)) == ("GET", f"http://{ADDRESS}/metrics")
    assert "accept" not in request.headers


def test_a_good_scrape_refreshes_the_metrics() -> None:
    endpoint = scraped(lambda _: httpx.Response(200, text=FULL), Endpoint(ADDRESS))
    assert (endpoint.metrics.waiting, endpoint.num_errors) == (3, 0)
    assert endpoint.metrics.updated_s is not None


@pytest.mark.parametrize(
    "answer",
    [
        unreachable,
        lambda _: httpx.Response(503, text=FULL),
        lambda _: httpx.Response(200, text=FULL + "größe 1\n"),
        lambda _: httpx.Response(200, text=FULL.rstrip()),
    ],
    ids=["unreachable", "503", "UTF-8 name", "no line feed"],
)
def test_a_failed_scrape_keeps_the_old_metrics_which_grow_stale(answer: Answer) -> None:
    endpoint = scraped(lambda _: httpx.Response(200, text=FULL), Endpoint(ADDRESS))
    before = endpoint.metrics
    assert scraped(answer, endpoint).metrics is before
    assert endpoint.num_errors == 1


def test_an_incomplete_scrape_is_fresh_and_counted() -> None:
    endpoint = scraped(lambda _: httpx.Response(200, text=FULL.replace("kv_cache", "kv")), Endpoint(ADDRESS))
    assert (endpoint.metrics.waiting, endpoint.num_errors) == (3, 1)


@pytest.mark.parametrize(
    ("answer", "is_ready"),
    [(lambda _: httpx.Response(200), True), (lambda _: httpx.Response(503), False), (unreachable, False)],
)
def test_one_probe_decides(answer: Answer, is_ready: bool) -> None:
    endpoint = Endpoint(ADDRESS, is_ready=not is_ready)
    asyncio.run(pool_of(answer).probe(endpoint))
    assert endpoint.is_ready is is_ready


def test_the_pool_is_what_the_file_says_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"

    async def run() -> None:
        pool = pool_of(lambda _: httpx.Response(200, text=FULL), path)
        path.write_text(listing(1, 2))
        await pool.open()
        assert set(pool.ready()) == {"127.0.0.1:1", "127.0.0.1:2"}
        kept = pool.ready()["127.0.0.1:2"]
        for text in ("{", "[]", '{"endpoints": [{"port": "1"}]}'):
            path.write_text(text)
            await asyncio.sleep(0.1)
            assert pool.addresses() == {"127.0.0.1:1", "127.0.0.1:2"}
        path.write_text(listing(2, 3))
        await asyncio.sleep(0.2)
        assert set(pool.ready()) == {"127.0.0.1:2", "127.0.0.1:3"}
        assert pool.ready()["127.0.0.1:2"].updated_s > kept.updated_s, "and scraping goes on"
        await pool.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
