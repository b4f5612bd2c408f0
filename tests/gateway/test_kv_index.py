"""The precise index: what it refuses, and that it knows what each of two real servers has in its cache."""

import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from kv_index import KVIndex, Malformed
from real_server import RealServer

TOPIC = b"kv@pod@m"
PAGE = ["BlockStored", [11], None, [1, 2], 2, None, "GPU", None]


def message(*events: list[Any], number: int = 0, topic: bytes = TOPIC) -> list[bytes]:
    return [topic, number.to_bytes(8, "big"), msgspec.msgpack.encode([1.5, list(events)])]


def test_pages_count_from_the_start_without_a_gap() -> None:
    index = KVIndex(2)
    index.feed(message(["BlockStored", [11, 12, 13], None, [1, 2, 3, 4, 5, 6], 2, None, "GPU", None]))
    index.feed(message(["BlockStored", [11, 12], None, [1, 2, 3, 4], 2, None, "GPU", None], topic=b"kv@b@m"))
    assert index.matches([1, 2, 3, 4, 5, 6, 7], "m") == {"pod": 3, "b": 2}
    assert index.matches([1, 2, 3, 4, 5], "m") == {"pod": 2, "b": 2}
    assert index.matches([3, 4], "m") == index.matches([1], "m") == index.matches([1, 2], "other") == {}
    index.feed(message(["BlockRemoved", [12], "GPU"], number=1))
    assert index.matches([1, 2, 3, 4, 5, 6], "m") == {"pod": 1, "b": 2}


def test_pages_of_an_adapter_are_those_of_its_name() -> None:
    index = KVIndex(2)
    index.feed(message([*PAGE[:-1], "poet"]))
    assert index.matches([1, 2], "poet") == {"pod": 1}
    assert index.matches([1, 2], "m") == {}


def test_a_page_behind_an_unknown_one_is_dropped() -> None:
    index = KVIndex(2)
    index.feed(message(["BlockStored", [12], 11, [3, 4], 2, None, "GPU", None]))
    index.feed(message(PAGE, number=1))
    assert index.matches([1, 2, 3, 4], "m") == {"pod": 1}
    assert index.num_dropped == 1


def test_clearing_forgets_one_pod() -> None:
    index = KVIndex(2)
    index.feed(message(PAGE))
    index.feed(message(PAGE, topic=b"kv@b@m"))
    index.feed(message(["AllBlocksCleared"], number=3))
    assert index.matches([1, 2], "m") == {"b": 1}
    assert index.num_missed == 2


@pytest.mark.parametrize(
    "frames",
    [
        message()[:2],
        message(topic=b"kv@pod"),
        message(topic=b"kv@pod@m@1"),
        [TOPIC, b"1", message()[2]],
        [TOPIC, bytes(8), msgspec.msgpack.encode({"ts": 1.5, "events": []})],
        message(["BlockMoved", [1]]),
        message(PAGE[:4]),
        message(["BlockStored", [11], None, [1, 2, 3], 2, None, "GPU", None]),
        message(["BlockStored", [11], None, [1, 2, 3, 4], 4, None, "GPU", None]),
        message([*PAGE, None, 0, "sliding_window", 4096]),
    ],
)
def test_what_the_picker_cannot_read_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(Malformed):
        KVIndex(2).feed(frames)


def test_the_index_knows_what_each_server_finds_in_its_cache(long_gemma2_dir: Path, tmp_path: Path) -> None:
    """Two, called pod-0 and, as nobody named it, by its host."""
    options = {"dtype": "fp32", "kv_cache_gib": 0.05, "served_model_name": "tiny", "page_tokens": 4}
    endpoints = [f"ipc://{tmp_path}/{number}" for number in range(2)]
    pods = ["pod-0", socket.gethostname()]
    prompts = ["abc def ghi " * 8, "abc def ghi " * 4 + "xyz " * 12]
    index = KVIndex(4)
    with (
        RealServer(
            long_gemma2_dir, kv_events_endpoint=endpoints[0], kv_events_topic="kv@pod-0@tiny", **options
        ) as first,
        RealServer(long_gemma2_dir, kv_events_endpoint=endpoints[1], **options) as second,
    ):
        servers = [first, second]
        tokens = [rendered(first, prompt) for prompt in prompts]
        for server, prompt in zip(servers, prompts, strict=True):
            cached_tokens(server, prompt)
        with zmq.Context() as context, context.socket(zmq.SUB) as sub:  # while the engines are idle
            sub.setsockopt(zmq.LINGER, 0)
            sub.setsockopt_string(zmq.SUBSCRIBE, "kv@")
            for endpoint in endpoints:
                sub.connect(endpoint)
            while len(index.matches(tokens[0], "tiny")) < 2:
                assert sub.poll(10_000), "nothing comes any more"
                index.feed(sub.recv_multipart())
        for pod, server in zip(pods, servers, strict=True):
            for prompt, ids in zip(prompts, tokens, strict=True):
                known = 4 * index.matches(ids, "tiny")[pod]
                assert cached_tokens(server, prompt) == min(known, (len(ids) - 1) // 4 * 4) > 0
    assert index.num_dropped == 0


def body_of(prompt: str) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}


def rendered(server: RealServer, prompt: str) -> list[int]:
    (one,) = server.http.post("/v1/completions/render", json=body_of(prompt)).json()
    return one["token_ids"]


def cached_tokens(server: RealServer, prompt: str) -> int:
    answer = server.http.post("/v1/completions", json=body_of(prompt)).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]
