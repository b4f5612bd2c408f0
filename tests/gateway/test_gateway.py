"""Through Envoy and the picker to real servers: the right one answers, clients notice nothing of the way."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from real_server import RealServer

pytestmark = pytest.mark.slow


def status(gateway: Gateway) -> int:
    """Of a short request, whatever it is."""
    body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    return gateway.http.post("/v1/completions", json=body).status_code


def test_answers_are_those_of_the_server_whole_or_streamed(gateway: Gateway, three: list[RealServer]) -> None:
    chat: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    with three[0].client() as direct, gateway.client() as client:
        expected = complete(direct, "hello", max_tokens=12)
        assert complete(client, "hello", max_tokens=12).choices == expected.choices
        stream = complete(client, "hello", max_tokens=12, stream=True, stream_options={"include_usage": True})
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        chunks = list(stream)
        assert text_of(chunks) == expected.choices[0].text
        assert chunks[-1].usage.completion_tokens == 12
        said = direct.chat.completions.create(**chat).choices[0].message.content
        assert client.chat.completions.create(**chat).choices[0].message.content == said
        parts = client.chat.completions.create(**chat, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == said


def test_events_pass_as_they_are_made_and_a_client_that_leaves_ends_its_request(
    gateway: Gateway, three: list[RealServer]
) -> None:
    with gateway.client() as client:
        stream = complete(client, stream=True, **LONG)
        next(stream)
        (server,) = [s for s in three if address(s.url) == stream.response.headers[SERVED]]
        assert server.metric("num_requests_running") == 1, "the first event must come before the last is made"
        stream.close()
        wait_until(lambda: server.metric("num_requests_running") == 0, 5)
        assert server.metric("kv_cache_usage_perc") == 0


def test_equal_replicas_take_turns(gateway: Gateway, three: list[RealServer]) -> None:
    with gateway.client() as client:
        twice_each = sorted(addresses(three) * 2)  # unless a scrape is late on a busy machine
        wait_until(lambda: sorted(server_of(client) for _ in range(6)) == twice_each)


def test_load_on_one_replica_sends_requests_to_the_others(gateway: Gateway, three: list[RealServer]) -> None:
    busy, *free = three
    with busy.client() as direct, gateway.client() as client, ThreadPoolExecutor() as threads:
        running = [complete(direct, stream=True, **LONG) for _ in range(2)]
        waiting = [threads.submit(complete, direct, stream=True, **LONG) for _ in range(2)]
        wait_until(lambda: busy.metric("num_requests_waiting") == 2)
        time.sleep(STALE_S)
        assert {server_of(client) for _ in range(8)} == set(addresses(free))
        assert busy.metric("num_requests_waiting") == 2, "the load must outlast the requests"
        for stream in running:
            stream.close()
        for future in waiting:
            future.result().close()
        wait_until(lambda: busy.metric("num_requests_running") == 0)
    wait_until_seen(gateway, *three)


def test_a_prefix_returns_to_the_replica_that_has_its_pages(gateway: Gateway) -> None:
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
        wait_until(lambda: len({server_of(client) for _ in range(3)}) == 3)  # others go on taking turns


def test_the_picker_reads_usage_and_status_of_whole_and_streamed_answers(gateway: Gateway) -> None:
    with gateway.client() as client:
        whole = complete(client, max_tokens=3).usage
        *_, last = complete(client, max_tokens=5, stream=True, stream_options={"include_usage": True})
        with pytest.raises(openai.NotFoundError) as missing:
            complete(client, model="nobody")
    assert missing.value.code == "model_not_found"
    wait_until(lambda: len(gateway.records()) == 3)
    records = gateway.records()
    assert [(record["model"], record["status"]) for record in records] == [
        (NAME, 200),
        (NAME, 200),
        ("nobody", 404),
    ]
    assert [records[0]["usage"], records[1]["usage"]] == [
        usage.model_dump(exclude_unset=True) for usage in (whole, last.usage)
    ]


def test_the_picker_refuses_what_it_cannot_read(gateway: Gateway) -> None:
    for body in ("{", '{"prompt": "no model"}'):
        refused = gateway.http.post("/v1/completions", content=body)
        assert refused.status_code == 400
        assert SERVED not in refused.headers
    with gateway.client() as client, pytest.raises(openai.BadRequestError, match="string `model`"):
        client.completions.create(model=None, prompt="a")  # type: ignore[call-overload]


def test_what_has_no_body_goes_anywhere_and_a_large_body_arrives_whole(
    gateway: Gateway, three: list[RealServer]
) -> None:
    with gateway.client() as client:
        assert [model.id for model in client.models.list()] == [NAME]
    content = b'{"model": "demo", "prompt": "a", "max_tokens": 1}'.ljust(300_000)
    headers = {"content-type": "application/json"}
    answer = gateway.http.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers[SERVED] in addresses(three)


def test_a_destination_that_a_client_names_is_overwritten(gateway: Gateway, three: list[RealServer]) -> None:
    headers = {"x-gateway-destination-endpoint": "127.0.0.1:9"}
    with gateway.client() as client:
        assert server_of(client, extra_headers=headers) in addresses(three)
    assert gateway.http.get("/v1/models", headers=headers).status_code == 200


def test_an_empty_pool_is_503_until_somebody_joins(gateway: Gateway, three: list[RealServer]) -> None:
    gateway.set_pool()
    with gateway.client() as client:
        wait_until(lambda: gateway.http.get("/v1/models").status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            complete(client)
        assert refused.value.status_code == 503
        assert refused.value.response.headers[DROPPED] == "rejected-no-endpoints"
        gateway.set_pool(three[1].url)
        wait_until(lambda: gateway.http.get("/v1/models").status_code == 200)
        assert {server_of(client) for _ in range(3)} == {address(three[1].url)}


def test_a_replica_with_stale_metrics_gets_nothing_until_they_are_fresh(
    gateway: Gateway, three: list[RealServer]
) -> None:
    stuck, *others = three
    with gateway.client() as client:
        stuck.process.suspend()
        try:
            time.sleep(STALE_S)
            assert {server_of(client) for _ in range(8)} == set(addresses(others))
        finally:
            stuck.process.resume()
    wait_until_seen(gateway, *three)


def test_while_all_metrics_are_stale_requests_are_held(gateway: Gateway, three: list[RealServer]) -> None:
    with gateway.client() as client, ThreadPoolExecutor() as threads:
        for server in three:
            server.process.suspend()
        try:
            time.sleep(STALE_S)
            held = threads.submit(server_of, client)
            time.sleep(STALE_S / 2)
            assert not held.done()
        finally:
            for server in three:
                server.process.resume()
        assert held.result(5) in addresses(three)


def test_a_held_request_gets_429_in_time_and_503_once_nobody_is_ready(three: list[RealServer]) -> None:
    one = three[0]
    gateway = Gateway(one.url, queue_ttl_s=0.2, probe_interval_s=PROBE_INTERVAL_S)
    with gateway, gateway.client() as client:
        one.process.suspend()
        try:
            time.sleep(STALE_S)
            with pytest.raises(openai.RateLimitError) as late:
                complete(client)
            assert late.value.response.headers[DROPPED] == "rejected-ttl-expired"
            wait_until(lambda: status(gateway) != 429)  # until a probe times out
            assert status(gateway) == 503
        finally:
            one.process.resume()
        wait_until(lambda: status(gateway) == 200)


def test_a_replica_that_drains_gets_nothing_new_and_loses_nothing(
    gateway: Gateway, three: list[RealServer], mortal: RealServer
) -> None:
    with gateway.client() as client:
        with_prefix_on(gateway, client, mortal, three)
        stream = complete(client, PREFIX, stream=True, **LONG)
        assert stream.response.headers[SERVED] == address(mortal.url)
        mortal.process.terminate()
        begun_s = time.monotonic()
        served_s, by_others = [0.0], 0
        while (elapsed_s := time.monotonic() - begun_s) < 2 * OPTIONS["lame_duck_s"] or by_others < 10:
            if server_of(client, PREFIX) == address(mortal.url):  # raises if it is refused
                served_s.append(elapsed_s)
            else:
                by_others += 1
        assert max(served_s) < OPTIONS["lame_duck_s"]
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
    assert mortal.exit_code() == 0


def test_a_replica_that_dies_is_avoided_within_the_staleness_threshold(
    gateway: Gateway, three: list[RealServer], mortal: RealServer
) -> None:
    with gateway.client() as client:
        with_prefix_on(gateway, client, mortal, three)
        stream = complete(client, PREFIX, stream=True, **LONG)
        assert stream.response.headers[SERVED] == address(mortal.url)
        mortal.process.kill()
        killed_s = time.monotonic()
        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
            text_of(stream)
        answered: list[str] = []
        while len(answered) < 10:
            elapsed_s = time.monotonic() - killed_s
            try:
                answered.append(server_of(client, PREFIX))
            except openai.InternalServerError:  # Envoy could not connect
                assert elapsed_s < STALE_S
        assert set(answered) <= set(addresses(three))


def test_a_replica_whose_engine_dies_is_avoided_before_any_probe(
    three: list[RealServer], mortal: RealServer
) -> None:
    urls = [mortal.url, *(server.url for server in three)]
    with Gateway(*urls, probe_interval_s=60) as gateway, gateway.client() as client:
        wait_until_seen(gateway, mortal, *three)
        mortal.engine.kill()
        time.sleep(STALE_S)
        assert {server_of(client) for _ in range(8)} == set(addresses(three))
