"""A server process as clients and Kubernetes meet it: the real `openai` client, signals, death."""

import asyncio
import dataclasses
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_process import ServerProcess
from fake_server import wait_until

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.engine.fake import FAKE_INFO, FakeEngine
from cabochon.server.config import ServerConfig
from cabochon.server.serve import _print_banner, bind, with_topic
from cabochon.server.settings import Settings


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as one:
        yield one


HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_the_banner_says_what_is_served_and_where(server: ServerProcess) -> None:
    for words in (
        "fake (FakeForCausalLM, fp32",
        "8,192 tokens",
        "ready at  http://127.0.0.1:",
        f"try it at {server.url.removesuffix('v1')}\n",
        "curl http://127",
    ):
        assert words in server.banner


def test_the_banner_says_that_weights_are_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(dataclasses.replace(FAKE_INFO, dtype="bf16", quantization="fp8"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        _print_banner(engine, sock, has_ui=False)
    assert "fake (FakeForCausalLM, bf16, weights fp8, 0.00 GiB of weights)" in capsys.readouterr().out


def test_openai_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=14, temperature=0)
    assert answer.choices[0].message.content == "user\nhello\nmodel\n"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens == 14


def test_openai_streams_a_chat_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=14, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "user\nhello\nmodel\n"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 14


def test_openai_completes_a_batch(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["hello", "world"], max_tokens=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["hellohello", "worldworld"]


def test_openai_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="fake", prompt="hello " * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"


def test_64_streams_at_once_all_come_through(server: ServerProcess) -> None:
    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        stream = await client.completions.create(
            model="fake", prompt=[300 + index], max_tokens=50, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            return await asyncio.gather(*(one(client, index) for index in range(64)))

    texts = asyncio.run(run())
    assert all(texts[index] == texts[index][: len(texts[index]) // 50] * 50 for index in range(64))
    assert len(set(texts)) > 50


def test_a_stream_that_openai_closes_is_aborted() -> None:
    with ServerProcess(faults={"delay_s": 0.02}) as server:
        with openai.OpenAI(base_url=server.url, api_key="none") as client:
            stream = client.completions.create(model="fake", prompt=[300], max_tokens=1000, stream=True)
            next(iter(stream))
            stream.close()
        metrics = server.url.removesuffix("/v1") + "/metrics"
        wait_until(lambda: 'finished_reason="abort",model_name="fake"} 1.0' in httpx.get(metrics).text)
        assert 'num_requests_running{model_name="fake"} 0.0' in httpx.get(metrics).text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(number: int) -> None:
    with ServerProcess(faults={"delay_s": 0.02}) as server:
        stream = server.stream(max_tokens=30)
        server.process.send_signal(number)
        time.sleep(0.2)
        assert httpx.post(server.url + "/completions", json={"prompt": "hello"}).status_code == 503
        assert httpx.get(server.url.removesuffix("/v1") + "/health").status_code == 503
        stream.join()
        assert stream.lines[-1] == "data: [DONE]"
        assert server.process.wait(10) == 0


def test_at_the_deadline_the_rest_ends_with_an_error() -> None:
    with ServerProcess(faults={"delay_s": 0.02}, server={"drain_timeout_s": 0.2}) as server:
        stream = server.stream(max_tokens=1000)
        server.process.terminate()
        stream.join()
        assert '"code":"engine_dead"' in stream.lines[-1]
        assert server.process.wait(10) == 0


def test_a_second_signal_ends_at_once() -> None:
    with ServerProcess(faults={"delay_s": 0.02}) as server:
        stream = server.stream(max_tokens=1000)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 0
        stream.join()
        assert stream.is_cut or "error" in stream.lines[-1]


def test_a_dead_engine_ends_the_process_with_a_failure() -> None:
    with ServerProcess(faults={"dies_after_tokens": 5}) as server:
        stream = server.stream(max_tokens=100)
        stream.join()
        assert "the engine process ended" in stream.lines[-1]
        assert httpx.get(server.url.removesuffix("/v1") + "/health").status_code == 503
        assert server.process.wait(10) == 1


def test_a_lame_duck_serves_for_a_while() -> None:
    with ServerProcess(server={"lame_duck_s": 0.5}) as server:
        server.process.terminate()
        health = server.url.removesuffix("/v1") + "/health"
        wait_until(lambda: httpx.get(health).status_code == 503)
        assert (
            httpx.post(server.url + "/completions", json={"prompt": "hello", "max_tokens": 1}).status_code
            == 200
        )
        assert server.process.wait(10) == 0


def test_a_port_in_use_is_an_error_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} is not .*choose another port"):
            bind("127.0.0.1", port)


def test_an_address_of_ipv6_is_bound() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with bind("::1", 0) as sock:
            assert sock.family is socket.AF_INET6
    except ConfigError:
        pytest.skip("no IPv6 loopback here")


@pytest.mark.parametrize(
    ("names", "options", "topic"),
    [
        ((), {}, f"kv@{socket.gethostname()}@demo"),
        (("gemma", "alias"), {}, f"kv@{socket.gethostname()}@gemma"),
        ((), {"merge_lora": "tickets=/adapter"}, f"kv@{socket.gethostname()}@tickets"),
        (("gemma",), {"kv_events_topic": "kv@pod@m"}, "kv@pod@m"),
        (("gemma",), {"kv_events_endpoint": None}, None),
    ],
)
def test_events_name_the_model_as_clients_do(
    names: tuple[str, ...], options: dict[str, Any], topic: str | None
) -> None:
    engine = EngineConfig(**{"kv_events_endpoint": "tcp://*:5557"} | options)
    assert with_topic(Settings(ServerConfig(served_model_name=names), engine)).kv_events_topic == topic
