"""Adapters loaded, used, refused and unloaded over HTTP while a real server generates."""

import itertools
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from lora_maker import make_adapter
from prometheus_client.parser import text_string_to_metric_families
from real_server import RealServer

from cabochon.engine.models.hf_config import load_model_config

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def home(long_gemma2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("loras")
    model = load_model_config(long_gemma2_dir)
    for seed, name in enumerate(("first", "second", "third", "cut")):
        make_adapter(home / name, model, 8, seed=seed, std=0.5)
    make_adapter(home / "large", model, 64, seed=9, std=0.1)  # a megabyte
    weights = home / "cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return home


@pytest.fixture(scope="module")
def server(long_gemma2_dir: Path, home: Path) -> Iterator[RealServer]:
    options = {"dtype": "fp32", "kv_cache_gib": 0.05, "served_model_name": "tiny", "max_loras": 2}
    with RealServer(
        long_gemma2_dir, lora_modules=f"first={home}/first", lora_dir=str(home), **options
    ) as real:
        yield real


def change(server: RealServer, path: str, name: str, **fields: Any) -> httpx.Response:
    return server.http.post(path, json={"lora_name": name, **fields})


def text(server: RealServer, model: str) -> str:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def test_a_loaded_adapter_changes_the_answer_until_it_is_unloaded(server: RealServer) -> None:
    base, first = text(server, "tiny"), text(server, "first")
    assert first != base
    loaded = change(server, LOAD, "second", lora_path="second")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'second' added successfully.")
    second = text(server, "second")
    assert second not in (base, first)
    assert change(server, LOAD, "second", lora_path="third").status_code == 400
    assert change(server, LOAD, "second", lora_path="third", load_inplace=True).status_code == 200
    assert text(server, "second") not in (base, first, second)
    assert (text(server, "tiny"), text(server, "first")) == (base, first)
    assert change(server, UNLOAD, "second").status_code == 200
    with server.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny", "first"]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="second", prompt="a")
    assert change(server, UNLOAD, "second").status_code == 404


def test_a_cut_file_is_a_400_and_the_server_serves_on(server: RealServer) -> None:
    refused = change(server, LOAD, "cut", lora_path="cut")
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["code"] == "invalid_adapter"
    assert change(server, LOAD, "cut", lora_path="nowhere").status_code == 400
    assert server.http.get("/v1/models/cut").status_code == 404
    assert server.health() == 200
    assert text(server, "first") == text(server, "first")


def test_the_metric_lists_what_is_in_slots(server: RealServer) -> None:
    for name in ("second", "third"):
        assert change(server, LOAD, name, lora_path=name).status_code == 200
    for name in ("first", "second", "third"):
        text(server, name)
    (family,) = [
        f for f in text_string_to_metric_families(server.metrics()) if f.name == "vllm:lora_requests_info"
    ]
    (sample,) = family.samples
    assert sample.labels["max_lora"] == "2"
    assert set(sample.labels["running_lora_adapters"].split(",")) == {"second", "third"}
    assert sample.labels["waiting_lora_adapters"] == ""
    for name in ("second", "third"):
        assert change(server, UNLOAD, name).status_code == 200


def test_changes_under_load_lose_no_request(server: RealServer) -> None:
    expected = {model: text(server, model) for model in ("tiny", "first")}
    with ThreadPoolExecutor(8) as pool:
        answers = [(model, pool.submit(text, server, model)) for model in ("tiny", "first") * 16]
        for _ in range(6):
            assert change(server, LOAD, "second", lora_path="second").status_code == 200
            assert change(server, UNLOAD, "second").status_code == 200
        for model, answer in answers:
            assert answer.result() == expected[model]
    assert "Traceback" not in server.output()


@pytest.mark.slow
def test_two_hundred_loads_under_32_streams_lose_no_request_and_leak_no_memory(
    long_gemma2_dir: Path, home: Path
) -> None:
    """The pool is small, so that its pages have all been written, and count, when counting begins."""
    models = ("tiny", "first", "second")
    modules = f"first={home}/first,second={home}/second"
    options = {"dtype": "fp32", "kv_cache_gib": 0.004, "max_model_len": 256, "served_model_name": "tiny"}
    resident = []
    is_over = threading.Event()
    with RealServer(long_gemma2_dir, lora_modules=modules, lora_dir=str(home), **options) as server:
        expected = {model: streamed(server, model) for model in models}

        def stream(index: int) -> int:
            model = models[index % len(models)]
            for count in itertools.count():
                if is_over.is_set():
                    return count
                assert streamed(server, model) == expected[model]
            raise AssertionError

        with ThreadPoolExecutor(32) as pool:
            streams = [pool.submit(stream, index) for index in range(32)]
            try:
                for _ in range(200):
                    assert change(server, LOAD, "large", lora_path="large").status_code == 200
                    text(server, "large")
                    assert change(server, UNLOAD, "large").status_code == 200
                    resident.append((server.engine.memory_info().rss, server.process.memory_info().rss))
            finally:
                is_over.set()
            assert min(one.result() for one in streams) > 3
    # malloc needs some time to reach its plateau; a megabyte that is not given back would be 100 of them
    for before, after in zip(resident[100], resident[-1], strict=True):
        assert after - before < 24 * 2**20, resident[::20]


def streamed(server: RealServer, model: str) -> bytes:
    """All events of a stream, without what differs from one to the next."""
    body = {
        "model": model, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True,
        "stream": True, "request_id": "same",
    }  # fmt: skip
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    return re.sub(rb'"created":\d+', b"", answer.content)
