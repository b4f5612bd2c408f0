"""`cabochon serve` as a user starts it: a server process, its engine process, their log and their metrics.

One torch thread: on shared cores two OpenMP threads wait for each other by spinning, which makes a step 30
times slower as soon as somebody else wants a core.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from fake_server import NO_LIMITS, wait_until

START_S = 120  # a start takes 3 s (the demo: 6 s) on an idle machine
END_S = 30
LOG, BANNER = "stderr", "stdout"


class RealServer:
    """A child that is ready when the context begins, and gone with its engine when it ends."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        """options: of `cabochon serve`, e.g. kv_cache_gib=0.3; True for a switch."""
        given = {"model": model, "port": 0, "threads": 1, **options}
        self._flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in given.items()
        ]
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> "RealServer":
        command = [sys.executable, "-m", "cabochon.server.cli", "serve", *self._flags]
        env = {name: value for name, value in os.environ.items() if not name.startswith("CABOCHON_")}
        with open(self._path(BANNER), "wb") as stdout, open(self._path(LOG), "wb") as stderr:
            self.process = psutil.Popen(command, stdout=stdout, stderr=stderr, env=env)
        try:
            wait_until(lambda: "  curl" in self._read(BANNER) or self.process.poll() is not None, START_S)
            ready = re.search(r"ready at +(\S+)/v1", self._read(BANNER))
            assert ready is not None, self.output()
            self.url = ready[1]
            self.http = httpx.Client(  # no TLS: saves 50 ms
                base_url=self.url, timeout=60, limits=NO_LIMITS, verify=False
            )
            self.health_at_banner = self.health()
            (self.engine,) = (
                child for child in self.process.children() if "cabochon.engine.process" in child.cmdline()
            )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._end()

    def health(self) -> int:
        """Status of /health."""
        return self.http.get("/health").status_code

    def output(self) -> str:
        """All that the server and its engine have written so far."""
        return self._read(BANNER) + self._read(LOG)

    def metrics(self) -> str:
        return self.http.get("/metrics").text

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series: its name without vllm:, and labels beside the model's."""
        for line in self.metrics().splitlines():
            if line.startswith(f"vllm:{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"/metrics has no {name} {labels}")

    def send(self, content: bytes) -> httpx.Response:
        """A body as it is to /v1/completions."""
        headers = {"Content-Type": "application/json"}
        return self.http.post("/v1/completions", content=content, headers=headers)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(**self._client_options())

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._client_options())

    @contextmanager
    def paused_engine(self) -> Iterator[None]:
        """The engine does nothing meanwhile, so that what is in flight stays in flight."""
        self.engine.suspend()
        try:
            yield
        finally:
            if not is_gone(self.engine):
                self.engine.resume()

    def exit_code(self) -> int:
        """Wait for the server's end; its engine must end with it."""
        code = self.process.wait(END_S)
        wait_until(lambda: is_gone(self.engine), END_S)
        return int(code)

    def _client_options(self) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120}

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / name

    def _read(self, name: str) -> str:
        return self._path(name).read_text(errors="replace")

    def _end(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for child in self.process.children():
                child.kill()
            self.process.kill()
        if hasattr(self, "engine") and not is_gone(self.engine):  # it outlived its server
            self.engine.kill()
        self.process.wait(END_S)
        self._folder.cleanup()


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; in a container nobody may fetch the exit code of an orphan."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
