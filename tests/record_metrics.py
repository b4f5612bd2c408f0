"""Records /metrics under load into tests/deploy/recordings, which the tests of rules and dashboard replay.

    PYTHONPATH=tests python tests/record_metrics.py good|overloaded|failing

good: a tiny random Gemma 2, four clients. overloaded: more requests than a pool of 73 pages serves, the
engine stopped two thirds of the time, and killed at the end. failing: FakeEngine with adapters, where a
third token fails a quarter of the time. A scrape every 0.25 s; one that fails is `up` 0 and no other sample.
"""

import gzip
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
from fake_server import LiveServer
from random_gemma import random_gemma2
from real_server import RealServer
from recorded_metrics import RECORDINGS, UP
from tiny_tokenizer import tiny_tokenizer

from cabochon.engine.errors import ComputeError
from cabochon.engine.fake import FAKE_INFO, FakeEngine

INTERVAL_S = 0.25
SCRAPES = 150
PREFIX = "the same words at the beginning of every prompt fill a few pages " * 2


def record(url: str, on_scrape: Callable[[int], None] = lambda number: None) -> dict[str, list[float | None]]:
    """[scrapes] of every series; None where a scrape failed."""
    series: dict[str, list[float | None]] = {}
    started_s = time.monotonic()
    for number in range(SCRAPES):
        time.sleep(max(0.0, started_s + number * INTERVAL_S - time.monotonic()))
        on_scrape(number)
        for name, value in _scrape(url).items():
            values = series.setdefault(name, [])
            values += [None] * (number - len(values))
            values.append(value)
    return {name: values + [None] * (SCRAPES - len(values)) for name, values in series.items()}


def _scrape(url: str) -> dict[str, float]:
    try:
        answer = httpx.get(f"{url}/metrics", timeout=2)
    except httpx.HTTPError:
        return {UP: 0}
    if answer.status_code != 200:
        return {UP: 0}
    lines = [line for line in answer.text.splitlines() if line and not line.startswith("#")]
    return {UP: 1} | {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


class Load:
    """Clients in threads, until the context ends or their server does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._numbers = itertools.count()

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def closed(self, clients: int) -> None:
        """Each sends its next request when the last has ended."""
        for _ in range(clients):
            threading.Thread(target=self._repeat, daemon=True).start()

    def open(self, per_s: float) -> None:
        """That many a second, whatever becomes of them."""

        def arrive() -> None:
            while not self._is_over.wait(1 / per_s):
                threading.Thread(target=self._ask, daemon=True).start()

        threading.Thread(target=arrive, daemon=True).start()

    def _repeat(self) -> None:
        while not self._is_over.is_set():
            self._ask()

    def _ask(self) -> None:
        number = next(self._numbers)
        body = {"prompt": f"{PREFIX}{number}", "max_tokens": 40 + number * 37 % 100, "ignore_eos": True}
        with suppress(httpx.HTTPError):
            httpx.post(f"{self._url}/v1/completions", json={**body, "stream": True}, timeout=120)


def _tiny_model(folder: str) -> Path:
    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    model = random_gemma2(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=2048, **ids)
    model.save_pretrained(folder)
    tokenizer.save(f"{folder}/tokenizer.json")
    return Path(folder)


def good() -> dict[str, list[float | None]]:
    with ExitStack() as stack:
        model = _tiny_model(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RealServer(model, kv_cache_gib=0.1, served_model_name="gemma"))
        stack.enter_context(Load(server.url)).closed(4)
        return record(server.url)


def overloaded() -> dict[str, list[float | None]]:
    with ExitStack() as stack:
        model = _tiny_model(stack.enter_context(tempfile.TemporaryDirectory()))
        options = {"kv_cache_gib": 0.00028, "max_model_len": 400, "max_seqs": 16, "max_queue_wait_s": 1000}
        server = stack.enter_context(RealServer(model, served_model_name="gemma", **options))
        stack.enter_context(Load(server.url)).open(4)
        is_over = threading.Event()

        def starve() -> None:
            with suppress(psutil.NoSuchProcess):
                while not is_over.wait(0.1):
                    with server.paused_engine():
                        time.sleep(0.2)

        thread = threading.Thread(target=starve)
        thread.start()

        def end(number: int) -> None:
            if number == SCRAPES - 10:
                is_over.set()
                thread.join()
                server.engine.kill()

        return record(server.url, end)


def failing() -> dict[str, list[float | None]]:
    engine = FakeEngine(replace(FAKE_INFO, max_loras=4))
    with LiveServer(engine=engine, served_model_name=("gemma",)) as server, Load(server.url) as load:
        engine.faults.delay_s, engine.faults.tokens_per_step = 0.01, 3
        engine.snapshot = replace(engine.snapshot, resident_adapters=["tickets"], waiting_adapters=["legal"])
        load.closed(4)

        def fail(number: int) -> None:
            error = ComputeError("the step must succeed, it failed: try again")
            engine.faults.fails_after_tokens = {3: error} if number % 4 == 0 else {}

        return record(server.url, fail)


def main() -> None:
    name = sys.argv[1]
    series = {"good": good, "overloaded": overloaded, "failing": failing}[name]()
    content = json.dumps({"interval_s": INTERVAL_S, "series": series})
    RECORDINGS.mkdir(exist_ok=True)
    (RECORDINGS / f"{name}.json.gz").write_bytes(gzip.compress(content.encode(), mtime=0))


if __name__ == "__main__":
    main()
