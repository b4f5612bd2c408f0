"""Real engines and real subscribers: what arrives, who joins late or reads too slowly, what is refused."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from kv_index import KVIndex

from cabochon.engine import kv_event_socket
from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.errors import ConfigError
from cabochon.engine.kv_event_socket import KVEventSocket
from cabochon.engine.kv_events import KVEvents
from cabochon.engine.load import load_engine
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams

ANY_PORT = "tcp://127.0.0.1:*"
PROMPT = list(range(8, 38))
WAIT_MS = 10_000


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def core_of(directory: Path, pod: str = "pod-1", **options: object) -> EngineCore:
    defaults = {
        "model": "tiny", "dtype": "fp32", "page_tokens": 4, "step_tokens": 64, "kv_cache_gib": 0.01,
        "threads": 1, "kv_events_endpoint": ANY_PORT, "kv_events_topic": f"kv@{pod}@tiny",
    }  # fmt: skip
    return load_engine(EngineConfig(**{**defaults, **options}), directory)[0]


def run(core: EngineCore, name: str, prompt: list[int], **fields: object) -> int:
    """Until the request has ended. Returns how many of its tokens were cached."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    core.add(GenerateRequest(request_id=name, prompt_ids=prompt, params=params, **fields))
    outputs = [output for _ in iter(lambda: core.has_work, False) for output in core.step()[0]]
    return outputs[-1].cached_tokens


class Reader:
    """A subscriber as the picker is one, on one or more engines."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], *endpoints: str, hwm: int = 1000) -> None:
        self.index = KVIndex(4)
        self.socket = context.socket(zmq.SUB)
        self.socket.set_hwm(hwm)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, "kv@")
        for endpoint in endpoints:
            self.socket.connect(endpoint)

    def read(self, until: Callable[[], bool]) -> None:
        while not until():
            assert self.socket.poll(WAIT_MS), "nothing comes any more"
            self.index.feed(self.socket.recv_multipart())

    def wait_for_connection(self, *sockets: KVEventSocket) -> None:
        """By the first message that an engine sends when it hears of a reader."""
        for one in sockets:
            while not one._has_new_reader():
                one._socket.poll(WAIT_MS)
            one.events.restart()
            one.send()
        for _ in sockets:
            assert self.socket.poll(WAIT_MS)
            self.index.feed(self.socket.recv_multipart())


@contextmanager
def reader_of(*endpoints: str, **options: int) -> Iterator[Reader]:
    with zmq.Context() as context:
        reader = Reader(context, *endpoints, **options)
        try:
            yield reader
        finally:
            reader.socket.close(linger=0)


def socket_of(core: EngineCore) -> KVEventSocket:
    assert core.kv_events is not None
    return core.kv_events


def test_a_picker_knows_what_an_engine_has(tiny_gemma2_dir: Path) -> None:
    cores = {pod: core_of(tiny_gemma2_dir, pod) for pod in ("pod-1", "pod-2")}
    sockets = [socket_of(core) for core in cores.values()]
    with reader_of(*(one.endpoint for one in sockets)) as reader:
        reader.wait_for_connection(*sockets)
        other = PROMPT[:10] + [3] * 20
        run(cores["pod-1"], "a", PROMPT)
        run(cores["pod-2"], "b", other)
        reader.read(lambda: reader.index.matches(PROMPT, "tiny") == {"pod-1": 7, "pod-2": 2})
        assert reader.index.matches(other, "tiny") == {"pod-1": 2, "pod-2": 7}
        assert reader.index.matches(PROMPT, "another") == {}
        assert run(cores["pod-1"], "c", PROMPT) == 7 * 4
        assert run(cores["pod-2"], "d", PROMPT) == 2 * 4
        assert reader.index.num_dropped == reader.index.num_missed == 0


def test_pages_that_are_evicted_are_forgotten(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir, max_model_len=64, max_seqs=1, kv_cache_gib=0.001)
    with reader_of(socket_of(core).endpoint) as reader:
        reader.wait_for_connection(socket_of(core))
        run(core, "a", PROMPT)
        reader.read(lambda: reader.index.matches(PROMPT, "tiny") == {"pod-1": 7})
        rng = np.random.default_rng(0)
        for number in range(core._cache.pool.num_pages // 14):
            run(core, f"{number}", rng.integers(3, 40, 60).tolist())
        reader.read(lambda: reader.index.matches(PROMPT, "tiny") == {})
        assert run(core, "again", PROMPT) == 0


def test_a_late_reader_is_told_everything_and_an_early_one_loses_nothing(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir)
    run(core, "a", PROMPT)
    with reader_of(socket_of(core).endpoint) as early:
        early.wait_for_connection(socket_of(core))
        assert early.index.matches(PROMPT, "tiny") == {"pod-1": 7}
        with reader_of(socket_of(core).endpoint) as late:
            for _ in range(100):
                core.get_ready()  # what an idle engine does now and then
                if late.socket.poll(20):
                    break
            late.read(lambda: late.index.matches(PROMPT, "tiny") == {"pod-1": 7})
            early.read(lambda: early.index._last["pod-1"] == late.index._last["pod-1"])
        assert early.index.matches(PROMPT, "tiny") == {"pod-1": 7}
        assert early.index.num_missed == 0


def test_a_reader_that_does_not_read_holds_up_nothing_and_sees_what_it_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_event_socket, "MAX_UNREAD", 8)
    events = KVEvents(512, [0])
    one = KVEventSocket(ANY_PORT, "kv@pod-1@tiny", events)
    with reader_of(one.endpoint, hwm=1) as reader:
        reader.index = KVIndex(512)
        reader.wait_for_connection(one)
        tokens = np.arange(10**6, 10**6 + 512, dtype=np.int32).tobytes()  # the kernel holds megabytes of them
        for number in range(20_000):
            events.store(number.to_bytes(16, "big"), None, tokens, None)
            one.send()
        assert not events.has_more
        while reader.socket.poll(200):
            reader.index.feed(reader.socket.recv_multipart())
        events.store(b"last", None, tokens, None)
        one.send()
        reader.read(lambda: reader.index._last["pod-1"] == 20_001)
        assert reader.index.num_missed > 1000


def test_a_flood_of_subscriptions_is_read_in_pieces() -> None:
    one = KVEventSocket(ANY_PORT, "kv@pod-1@tiny", KVEvents(4, [0]))
    with zmq.Context() as context, context.socket(zmq.XSUB) as flood:
        flood.setsockopt(zmq.LINGER, 0)
        flood.connect(one.endpoint)
        for number in range(1000):
            flood.send(b"\1kv@" + number.to_bytes(2, "big"))
        for _ in range(5):
            one._socket.poll(WAIT_MS)
            one.send()
        assert one._socket.poll(WAIT_MS), "it was all read at once"


def test_the_port_is_free_when_the_engine_is_gone() -> None:
    one = KVEventSocket(ANY_PORT, "kv@pod-1@tiny", KVEvents(4, [0]))
    endpoint = one.endpoint
    with pytest.raises(ConfigError) as error:
        KVEventSocket(endpoint, "kv@pod-1@tiny", KVEvents(4, [0]))
    assert str(error.value) == (
        f"kv_events_endpoint must be an address to listen on, got {endpoint} (Address already in use"
        f" (addr='{endpoint}')): choose a free port of this machine"
    )
    del one, error
    gc.collect()
    KVEventSocket(endpoint, "kv@pod-1@tiny", KVEvents(4, [0]))


def test_without_pyzmq_it_says_what_to_install(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.delitem(sys.modules, "cabochon.engine.kv_event_socket")
    message = r"^kv_events_endpoint needs pyzmq, got .*zmq.*: install cabochon\[kv-events\], or leave it out$"
    with pytest.raises(ConfigError, match=message):
        core_of(tiny_gemma2_dir)
