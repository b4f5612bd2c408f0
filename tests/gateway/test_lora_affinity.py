"""LoRA affinity with real adapters: requests go to the replica whose slot has theirs, else to a free slot."""

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import openai
import pytest
from fake_server import wait_until
from gateway import OPTIONS, PROBE_INTERVAL_S, SERVED, Gateway, address, started
from lora_maker import make_adapter
from pool import SCRAPE_INTERVAL_S
from real_server import RealServer
from tools import need_gateway_tools

from cabochon.engine.models.hf_config import load_model_config

pytestmark = pytest.mark.slow

NAMES = ("red", "blue", "green", "grey")
WEIGHTS = '{"lora": 3}'
NUMBERS = count()


@pytest.fixture(scope="module")
def adapted(long_gemma2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealServer]]:
    """Three servers that know four adapters and have a slot for one."""
    need_gateway_tools()
    home, config = tmp_path_factory.mktemp("adapters"), load_model_config(long_gemma2_dir)
    paths = [make_adapter(home / name, config, 8, seed=seed, std=0.2) for seed, name in enumerate(NAMES)]
    modules = ",".join(f"{path.name}={path}" for path in paths)
    options = {**OPTIONS, "lora_modules": modules, "max_loras": 1}
    servers = [RealServer(long_gemma2_dir, **options) for _ in range(3)]
    with started(servers):
        yield servers


def answer(client: openai.OpenAI, model: str, prompt: str = "hello") -> tuple[str, str]:
    """The text, and the address that made it (empty without a gateway)."""
    raw = client.completions.with_raw_response.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
    whole = raw.parse()
    assert whole.model == model
    return whole.choices[0].text, raw.headers.get(SERVED, "")


def listing(adapted: list[RealServer], name: str) -> set[str]:
    """Addresses of the servers whose metrics say that the adapter is in their slot."""
    return {address(s.url) for s in adapted if f'running_lora_adapters="{name}"' in s.metrics()}


def served(client: openai.OpenAI, model: str, num: int = 4) -> set[str]:
    """Who answers, each time to a prompt that nobody has seen."""
    return {answer(client, model, f"{next(NUMBERS)} is a number")[1] for _ in range(num)}


def test_requests_for_an_adapter_go_where_it_is_then_where_a_slot_is_free(adapted: list[RealServer]) -> None:
    first, second, third = (address(server.url) for server in adapted)
    texts = {}
    for name, server in zip(("red", "blue"), adapted, strict=False):
        with server.client() as direct:
            texts |= {model: answer(direct, model)[0] for model in (name, "demo")}
        wait_until(lambda name=name, server=server: listing(adapted, name) == {address(server.url)})
    assert len(set(texts.values())) == 3, "every adapter must say something else"

    urls = [server.url for server in adapted]
    gateway = Gateway(*urls, weights=WEIGHTS, probe_interval_s=PROBE_INTERVAL_S)
    with gateway, gateway.client() as client:
        assert served(client, "red") == {first}
        assert served(client, "blue") == {second}
        assert served(client, "green") == {third}  # the only free slot, then where it is
        assert served(client, "red") == {first}
        assert {name: answer(client, name)[0] for name in texts} == texts
        assert served(client, "demo", 6) == {first, second, third}
        (owner,) = served(client, "grey", 1)  # no slot is free: whoever it is gives its own up
        wait_until(lambda: listing(adapted, "grey") == {owner})
        time.sleep(10 * SCRAPE_INTERVAL_S)  # until the picker knows it too: a second owner would stay one
        assert served(client, "grey") == {owner}
