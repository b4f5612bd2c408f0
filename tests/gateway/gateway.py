"""A gateway on this machine: real Envoy and the picker, in front of the servers that a test lists."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from string import Template
from typing import Any

import httpx
import openai
from fake_server import NO_LIMITS, wait_until
from tools import need_gateway_tools

HERE = Path(__file__).parent
SERVER = HERE.parents[1] / "server"
SERVED = "x-gateway-destination-endpoint-served"
DROPPED = "x-llm-d-request-dropped-reason"
START_S = 30
PROBE_INTERVAL_S = 0.5  # of the picker that tests start
OPTIONS: dict[str, Any] = {  # of servers behind a gateway: tiny models, a third request waits
    "dtype": "fp32",
    "kv_cache_gib": 0.02,
    "max_seqs": 2,
    "served_model_name": "demo",
    "lame_duck_s": 3 * PROBE_INTERVAL_S,
    "drain_timeout_s": 30,
}
ENVOY_OPTIONS = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")


def address(url: str) -> str:
    """host:port of a server's URL, as the picker writes it."""
    return url.removeprefix("http://")


@contextmanager
def started(servers: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """All of them at once: each takes seconds to start."""
    with ExitStack() as stack:
        with ThreadPoolExecutor() as threads:
            tasks = [threads.submit(stack.enter_context, server) for server in servers]
        for task in tasks:
            task.result()
        yield


class Gateway:
    """Two child processes that are ready when the context begins, and gone when it ends."""

    def __init__(self, *urls: str, **options: Any) -> None:
        """urls: of the servers in the pool. options: of the picker, e.g. queue_ttl_s=2."""
        self._tools = need_gateway_tools()
        self._urls = urls
        self._flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]

    def __enter__(self) -> "Gateway":
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (self._folder / "cabochon").mkdir()  # as much of it as the picker's environment needs
            (self._folder / "cabochon" / "server").symlink_to(SERVER)
            self.set_pool(*self._urls)
            picker = [self._tools / "python", HERE / "picker.py", f"--pool-file={self._folder / 'pool.json'}"]
            self._start(stack, "picker", [*picker, *self._flags])
            wait_until(lambda: self._output("picker.out"), START_S)
            port = json.loads(self._output("picker.out").splitlines()[0])["port"]
            config = self._folder / "envoy.yaml"
            config.write_text(Template((HERE / "envoy.yaml").read_text()).substitute(picker_port=port))
            admin = self._folder / "admin"
            envoy = [self._tools / "envoy", "-c", config, "--admin-address-path", admin, *ENVOY_OPTIONS]
            self._start(stack, "envoy", envoy)
            wait_until(lambda: admin.exists() and admin.read_text(), START_S)
            self.url = f"http://{self._listener(admin.read_text())}"
            http = httpx.Client(base_url=self.url, timeout=60, limits=NO_LIMITS, verify=False)
            self.http = stack.enter_context(http)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def set_pool(self, *urls: str) -> None:
        """Other servers from now on; the picker reads the file within 50 ms."""
        pairs = [address(url).split(":") for url in urls]
        listed = [{"name": port, "address": host, "port": port} for host, port in pairs]
        path = self._folder / "pool.json"
        path.with_suffix(".new").write_text(json.dumps({"endpoints": listed}))
        path.with_suffix(".new").replace(path)

    def records(self) -> list[dict[str, Any]]:
        """What the picker says of each request that has ended: path, picked, status, usage."""
        return [json.loads(line) for line in self._output("picker.out").splitlines()[1:]]

    def client(self) -> openai.OpenAI:
        """The real client; it retries nothing, so that every failure is seen."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def output(self) -> str:
        """All that picker and Envoy have complained of."""
        return self._output("picker.err") + self._output("envoy.err")

    def _start(self, stack: ExitStack, name: str, command: Iterable[object]) -> None:
        env = os.environ | {"PYTHONPATH": str(self._folder)}
        with open(self._folder / f"{name}.out", "wb") as out, open(self._folder / f"{name}.err", "wb") as err:
            process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err, env=env)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)

    def _output(self, name: str) -> str:
        return (self._folder / name).read_text(errors="replace")

    def _listener(self, admin: str) -> str:
        """host:port where Envoy takes clients."""
        found: list[str] = []

        def is_there() -> bool:
            found[:] = re.findall(r"clients::(\S+)", httpx.get(f"http://{admin}/listeners").text)
            return bool(found)

        wait_until(is_there, START_S)
        return found[0]
