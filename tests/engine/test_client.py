"""The engine process through its client: outputs, aborts, and every way it can die."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from cabochon.engine.client import EngineClient
from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import Aborted, BadPrompt, EngineDead, RequestError, UnsupportedModel
from cabochon.engine.messages import GenerateRequest, RequestOutput
from cabochon.engine.sampling_params import SamplingParams

CONFIG = EngineConfig(
    model="tiny", dtype="fp32", kv_cache_gib=0.02, page_tokens=4, max_seqs=8, step_tokens=64, threads=1
)


def request(name: str, length: int = 5, max_tokens: int = 8, **fields: object) -> GenerateRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    prompt = [10 + i % 50 for i in range(length)]
    return GenerateRequest(
        request_id=name, prompt_ids=prompt, params=params, arrival_s=time.monotonic(), **fields
    )


def with_client(
    directory: Path, body: Callable[[EngineClient], Awaitable[None]], step_timeout_s: float = 30
) -> None:
    """Run `body` with a started client; the process must be gone afterwards."""

    async def main() -> None:
        client = EngineClient(CONFIG, directory, step_timeout_s=step_timeout_s)
        try:
            await client.start()
            await asyncio.wait_for(body(client), 60)
        finally:
            await client.shutdown()
        assert not psutil.pid_exists(client.pid)

    asyncio.run(main())


async def collect(stream: AsyncIterator[RequestOutput]) -> list[int]:
    return [token_id async for output in stream for token_id in output.token_ids]


async def until(is_true: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.01)


def test_requests_run_together_and_alone_with_the_same_tokens(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        together = await asyncio.gather(*(collect(client.submit(request(f"a{i}", 3 + i))) for i in range(8)))
        for i, tokens in enumerate(together):
            assert len(tokens) == 8
            assert await collect(client.submit(request(f"b{i}", 3 + i))) == tokens
        assert client.stats().generation_tokens == 128
        assert client.info.architecture == "Gemma2ForCausalLM"

    with_client(tiny_gemma2_dir, body)


def test_a_refused_request_raises_and_the_others_go_on(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        good = client.submit(request("good", max_tokens=50))
        with pytest.raises(BadPrompt, match="at least one token") as caught:
            await collect(client.submit(request("bad", length=0)))
        assert caught.value.param == "prompt"
        with pytest.raises(RequestError, match="request ids must be unique, good is running"):
            await collect(client.submit(request("good")))
        assert len(await collect(good)) == 50

    with_client(tiny_gemma2_dir, body)


def test_closing_a_stream_frees_its_pages(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        stream = client.submit(request("long", max_tokens=400))
        await anext(stream)
        await until(lambda: client.stats().pages_used > 0)
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: client.stats().pages_used == 0)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    with_client(tiny_gemma2_dir, body)


def test_a_killed_engine_ends_every_open_request(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        streams = [client.submit(request(f"{i}", max_tokens=400)) for i in range(4)]
        for stream in streams:
            await anext(stream)
        os.kill(client.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDead, match="the engine process ended, exit code -9"):
                await collect(stream)
        assert "exit code -9" in (client.dead_reason() or "")
        with pytest.raises(EngineDead):
            await collect(client.submit(request("late")))

    with_client(tiny_gemma2_dir, body)


def test_a_stopped_engine_counts_as_hung(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        stream = client.submit(request("a", max_tokens=400))
        await anext(stream)
        os.kill(client.pid, signal.SIGSTOP)
        with pytest.raises(EngineDead, match="must step every 1 s while requests are open"):
            await collect(stream)

    with_client(tiny_gemma2_dir, body, step_timeout_s=1)


def test_requests_that_a_hung_engine_has_not_seen_count_as_waiting(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        running = client.submit(request("a", max_tokens=400))
        await anext(running)
        os.kill(client.pid, signal.SIGSTOP)
        assert (client.stats().running, client.stats().waiting) == (1, 0)
        unseen = [client.submit(request(f"{i}", max_tokens=1)) for i in range(3)]
        assert client.stats().waiting == 0, "each new request would look like a queue, for a step"
        await until(lambda: client.stats().waiting == 3)
        assert client.stats().running == 1
        client.abort("0")
        assert client.stats().waiting == 2
        os.kill(client.pid, signal.SIGCONT)
        for stream in unseen[1:]:
            await collect(stream)
        await until(lambda: client.stats().waiting == 0)
        client.abort("a")

    with_client(tiny_gemma2_dir, body)


def test_an_idle_engine_never_counts_as_hung(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        await asyncio.sleep(1.5)
        assert client.dead_reason() is None
        assert len(await collect(client.submit(request("a")))) == 8

    with_client(tiny_gemma2_dir, body, step_timeout_s=0.5)


def test_shutdown_ends_open_requests_and_is_idempotent(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        stream = client.submit(request("a", max_tokens=400))
        await anext(stream)
        await client.shutdown()
        await client.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await collect(stream)

    with_client(tiny_gemma2_dir, body)


def test_a_private_request_shares_only_after_publish(tiny_gemma2_dir: Path) -> None:
    async def cached(client: EngineClient, name: str) -> int:
        outputs = [output async for output in client.submit(request(name, 40, max_tokens=1))]
        return outputs[-1].cached_tokens

    async def body(client: EngineClient) -> None:
        private = client.submit(request("private", 40, max_tokens=400, is_private=True))
        await anext(private)
        assert await cached(client, "early") == 0
        client.publish("private")
        client.publish("unknown")
        assert await cached(client, "late") == 36

    with_client(tiny_gemma2_dir, body)


def test_a_model_that_cannot_be_loaded_raises_what_the_engine_raised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')

    async def main() -> None:
        client = EngineClient(CONFIG, tmp_path)
        with pytest.raises(UnsupportedModel, match=r"llama \(LlamaForCausalLM\)"):
            await client.start()
        await client.shutdown()

    asyncio.run(main())


def test_the_engine_ends_when_its_server_is_killed(tiny_gemma2_dir: Path) -> None:
    read, write = os.pipe()
    server = os.fork()
    if server == 0:  # the child: a server that starts an engine, tells its pid and dies without a word

        async def main() -> None:
            client = EngineClient(CONFIG, tiny_gemma2_dir)
            await client.start()
            os.write(write, str(client.pid).encode())
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    os.waitpid(server, 0)
    engine = int(os.read(read, 32))
    deadline = time.monotonic() + 10
    while psutil.pid_exists(engine) and psutil.Process(engine).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlives its server"
        time.sleep(0.05)


def test_who_reads_an_aborted_request_is_told(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        stream = client.submit(request("a", max_tokens=400))
        await anext(stream)
        client.abort("a")
        with pytest.raises(Aborted, match="request a was aborted"):
            await collect(stream)
        await until(lambda: client.stats().pages_used == 0)

    with_client(tiny_gemma2_dir, body)


def test_an_id_that_is_used_again_gets_its_own_tokens(tiny_gemma2_dir: Path) -> None:
    async def body(client: EngineClient) -> None:
        expected = await collect(client.submit(request("a", length=9)))
        for _ in range(20):
            stream = client.submit(request("x", length=4, max_tokens=100))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            outputs = [output async for output in client.submit(request("x", length=9))]
            assert [token for output in outputs for token in output.token_ids] == expected
            assert {output.request_id for output in outputs} == {"x"}

    with_client(tiny_gemma2_dir, body)
