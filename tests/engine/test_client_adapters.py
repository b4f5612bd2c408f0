"""Questions about adapters through the client, to an engine process whose every word is scripted."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cabochon.engine import client as client_module
from cabochon.engine.channel import FrameReader, Message, encode
from cabochon.engine.client import EngineClient
from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import BadAdapter, EngineDead, UnknownAdapter
from cabochon.engine.fake import FAKE_INFO
from cabochon.engine.messages import (
    AdapterInfo,
    AdapterReply,
    GenerateRequest,
    LoadAdapter,
    Ready,
    Refusal,
    Start,
    StepOutput,
    Submit,
    UnloadAdapter,
)
from cabochon.engine.sampling_params import SamplingParams


class Peer:
    """In the place of subprocess.Popen: a thread at the other end of the socket, sending what it is told."""

    pid = 0

    def __init__(self, _command: object, pass_fds: list[int], **_: object) -> None:
        self._socket = socket.socket(fileno=os.dup(pass_fds[0]))
        self.seen: list[Message] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        reader = FrameReader()
        while data := self._socket.recv(1 << 16):
            for message in reader.feed(data):
                if isinstance(message, Start):
                    self.send(Ready(info=replace(FAKE_INFO, max_loras=2)))
                else:
                    self.seen.append(message)
        self._socket.close()

    def send(self, *messages: Message) -> None:
        self._socket.sendall(b"".join(map(encode, messages)))

    def end(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout_s: float | None = None) -> int:
        self._thread.join(timeout_s)
        return 3

    async def until_seen(self, count: int) -> list[Any]:
        deadline = time.monotonic() + 10
        while len(self.seen) < count:
            assert time.monotonic() < deadline, f"seen {len(self.seen)} of {count}"
            await asyncio.sleep(0.005)
        return list(self.seen)


def info(name: str) -> AdapterInfo:
    return AdapterInfo(name=name, path=f"/{name}", rank=8, num_bytes=1, base_model=None)


def refusal(error: str) -> Refusal:
    return Refusal(request_id="", error=error, message="as the engine says", param="lora_path")


def with_peer(
    monkeypatch: pytest.MonkeyPatch,
    body: Callable[[EngineClient, Peer], Awaitable[None]],
    step_timeout_s: float = 30,
) -> None:
    monkeypatch.setattr(client_module.subprocess, "Popen", Peer)

    async def main() -> None:
        client = EngineClient(EngineConfig(), Path("/"), step_timeout_s=step_timeout_s)
        await client.start()
        peer = client._process
        assert isinstance(peer, Peer)
        try:
            await asyncio.wait_for(body(client, peer), 20)
        finally:
            await client.shutdown()

    asyncio.run(main())


def test_each_question_gets_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        names = [f"a{i}" for i in range(32)]
        loads = [asyncio.ensure_future(client.load_adapter(name, f"/{name}")) for name in names]
        seen = await peer.until_seen(32)
        assert [(m.name, m.path, m.replace) for m in seen] == [(name, f"/{name}", False) for name in names]
        assert len({m.reply_to for m in seen}) == 32
        peer.send(*(AdapterReply(reply_to=m.reply_to, info=info(m.name)) for m in reversed(seen)))
        assert [(await load).name for load in loads] == names
        unload = asyncio.ensure_future(client.unload_adapter("a0"))
        question = (await peer.until_seen(33))[-1]
        assert question == UnloadAdapter(reply_to=question.reply_to, name="a0")
        peer.send(AdapterReply(reply_to=question.reply_to))
        await unload

    with_peer(monkeypatch, body)


def test_a_refusal_is_raised_as_the_engines_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        load = asyncio.ensure_future(client.load_adapter("a", "/a", replace=True))
        (question,) = await peer.until_seen(1)
        assert question == LoadAdapter(reply_to=question.reply_to, name="a", path="/a", replace=True)
        peer.send(AdapterReply(reply_to=question.reply_to, refusal=refusal("BadAdapter")))
        with pytest.raises(BadAdapter, match="as the engine says") as caught:
            await load
        assert caught.value.param == "lora_path"
        unload = asyncio.ensure_future(client.unload_adapter("a"))
        question = (await peer.until_seen(2))[-1]
        peer.send(AdapterReply(reply_to=question.reply_to, refusal=refusal("UnknownAdapter")))
        with pytest.raises(UnknownAdapter):
            await unload

    with_peer(monkeypatch, body)


def test_a_dead_engine_answers_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        load = asyncio.ensure_future(client.load_adapter("a", "/a"))
        unload = asyncio.ensure_future(client.unload_adapter("b"))
        await peer.until_seen(2)
        peer.end()
        for question in (load, unload, client.load_adapter("c", "/c"), client.unload_adapter("d")):
            with pytest.raises(EngineDead, match="the engine process ended, exit code 3"):
                await question

    with_peer(monkeypatch, body)


def test_shutdown_answers_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        load = asyncio.ensure_future(client.load_adapter("a", "/a"))
        await peer.until_seen(1)
        await client.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await load

    with_peer(monkeypatch, body)


def test_a_long_load_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        load = asyncio.ensure_future(client.load_adapter("a", "/a"))
        (question,) = await peer.until_seen(1)
        await asyncio.sleep(0.8)
        assert client.dead_reason() is None
        peer.send(AdapterReply(reply_to=question.reply_to, info=info("a")))
        assert (await load).name == "a"

    with_peer(monkeypatch, body, step_timeout_s=0.2)


def test_an_answer_is_a_sign_of_life_and_silence_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        stream = client.submit(
            GenerateRequest(request_id="r", prompt_ids=[7], params=SamplingParams(max_tokens=9), adapter="a")
        )
        assert [m.request.adapter for m in await peer.until_seen(1) if isinstance(m, Submit)] == ["a"]
        for count in range(10):
            unload = asyncio.ensure_future(client.unload_adapter("a"))
            question = (await peer.until_seen(count + 2))[-1]
            peer.send(AdapterReply(reply_to=question.reply_to))
            await unload
            await asyncio.sleep(0.1)
        assert client.dead_reason() is None
        with pytest.raises(EngineDead, match=r"must step every 0\.5 s"):
            await anext(stream)

    with_peer(monkeypatch, body, step_timeout_s=0.5)


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("is_refused", [False, True])
def test_a_cancelled_load_is_undone_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, is_replaced: bool, is_refused: bool
) -> None:
    """Unless it came to nothing, or the name may have been another's before."""

    async def body(client: EngineClient, peer: Peer) -> None:
        load = asyncio.ensure_future(client.load_adapter("a", "/a", replace=is_replaced))
        (question,) = await peer.until_seen(1)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        answer = {"refusal": refusal("BadAdapter")} if is_refused else {"info": info("a")}
        peer.send(AdapterReply(reply_to=question.reply_to, **answer))  # type: ignore[arg-type]
        last = asyncio.ensure_future(client.unload_adapter("last"))
        await unloads(peer, [] if is_replaced or is_refused else ["a"])
        await last

    with_peer(monkeypatch, body)


def test_a_load_that_is_cancelled_just_as_it_ends_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        load = asyncio.ensure_future(client.load_adapter("a", "/a"))
        (question,) = await peer.until_seen(1)
        client.on_step(lambda _: load.cancel())
        peer.send(AdapterReply(reply_to=question.reply_to, info=info("a")), StepOutput())
        with pytest.raises(asyncio.CancelledError):
            await load
        last = asyncio.ensure_future(client.unload_adapter("last"))
        await unloads(peer, ["a"])
        await last

    with_peer(monkeypatch, body)


async def unloads(peer: Peer, expected: Iterable[str]) -> None:
    """Answer all unloads up to that of "last"; before or after it, those of `expected` must have come."""
    names = {"last", *expected}
    await peer.until_seen(1 + len(names))
    await asyncio.sleep(0.05)  # nor any other
    found = [message for message in peer.seen if isinstance(message, UnloadAdapter)]
    assert sorted(message.name for message in found) == sorted(names)
    peer.send(*(AdapterReply(reply_to=message.reply_to) for message in found))
