"""The endpoints of the pool: who is in it, who is ready, what their last metrics say.

A file lists them (llm-d-router's file-discovery; JSON is YAML), and is read again when it changes. Readiness
is what a kubelet would see: GET /health, one failure is enough. /metrics is read every 50 ms.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from cabochon.server.gateway.endpoint_metrics import EndpointMetrics, extract
from cabochon.server.gateway.exposition import FormatError, parse

logger = logging.getLogger(__name__)

SCRAPE_INTERVAL_S = 0.05
SCRAPE_TIMEOUT_S = 1.0
PROBE_TIMEOUT_S = 2.0  # KubeRay's
RELOAD_INTERVAL_S = 0.05


@dataclass
class Endpoint:
    """One port of one model server."""

    address: str  # host:port
    metrics: EndpointMetrics = field(default_factory=EndpointMetrics)
    is_ready: bool = False
    num_errors: int = 0  # scrapes that failed or lacked something


class Pool:
    """Keeps endpoints up to date in tasks of its own between `open` and `close`."""

    def __init__(self, path: Path, client: httpx.AsyncClient, probe_interval_s: float) -> None:
        self._path = path
        self._client = client
        self._probe_interval_s = probe_interval_s
        self._text = ""
        self._endpoints: dict[str, Endpoint] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._reloading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the file and every endpoint in it once, then go on in the background."""
        self._reload()
        for endpoint in self._endpoints.values():
            await asyncio.gather(self.scrape(endpoint), self.probe(endpoint))
        self._reloading = asyncio.create_task(_every(RELOAD_INTERVAL_S, self._reload_if_changed))

    async def close(self) -> None:
        """End all tasks."""
        tasks = [task for pair in self._tasks.values() for task in pair]
        if self._reloading is not None:
            tasks.append(self._reloading)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def ready(self) -> dict[str, EndpointMetrics]:
        """Addresses and last metrics of those that may get requests."""
        return {e.address: e.metrics for e in self._endpoints.values() if e.is_ready}

    def addresses(self) -> set[str]:
        """All that the file lists."""
        return set(self._endpoints)

    async def scrape(self, endpoint: Endpoint) -> None:
        """Read /metrics once; whatever goes wrong leaves the old values, which grow stale."""
        try:
            answer = await self._client.get(f"http://{endpoint.address}/metrics", timeout=SCRAPE_TIMEOUT_S)
            if answer.status_code != 200:
                raise FormatError(f"the status must be 200, it is {answer.status_code}: see the server's log")
            families = parse(answer.text)
        except (httpx.HTTPError, FormatError) as error:
            endpoint.num_errors += 1
            logger.debug("scrape failed endpoint=%s error=%s", endpoint.address, error)
            return
        endpoint.metrics, errors = extract(families, endpoint.metrics, time.monotonic())
        endpoint.num_errors += bool(errors)

    async def probe(self, endpoint: Endpoint) -> None:
        """Ask /health once."""
        try:
            answer = await self._client.get(f"http://{endpoint.address}/health", timeout=PROBE_TIMEOUT_S)
            is_ready = answer.status_code == 200
        except httpx.HTTPError:
            is_ready = False
        if is_ready != endpoint.is_ready:
            logger.info("endpoint %s ready=%s", endpoint.address, is_ready)
        endpoint.is_ready = is_ready

    async def _reload_if_changed(self) -> None:
        if self._path.read_text() != self._text:
            self._reload()

    def _reload(self) -> None:
        """A file that cannot be read changes nothing."""
        self._text = self._path.read_text()
        try:
            listed = [f"{one['address']}:{one['port']}" for one in json.loads(self._text)["endpoints"]]
        except (ValueError, KeyError, TypeError):
            logger.warning("pool file %s is not a list of endpoints: the old one stays", self._path)
            return
        for address in set(self._endpoints) - set(listed):
            del self._endpoints[address]
            for task in self._tasks.pop(address):
                task.cancel()
        for address in listed:
            if address not in self._endpoints:
                self._add(Endpoint(address))

    def _add(self, endpoint: Endpoint) -> None:
        self._endpoints[endpoint.address] = endpoint
        self._tasks[endpoint.address] = [
            asyncio.create_task(_every(SCRAPE_INTERVAL_S, lambda: self.scrape(endpoint))),
            asyncio.create_task(_every(self._probe_interval_s, lambda: self.probe(endpoint))),
        ]


def http_client() -> httpx.AsyncClient:
    """Asks as the picker does: plain HTTP/1.1, and no Accept header."""
    client = httpx.AsyncClient(verify=False)  # no TLS: saves 50 ms
    del client.headers["accept"]
    return client


async def _every(interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Like Go's ticker: at multiples of the interval; ticks that came during the work are one."""
    start = time.monotonic()
    while True:
        await work()
        ticks = math.floor((time.monotonic() - start) / interval_s) + 1
        await asyncio.sleep(start + ticks * interval_s - time.monotonic())
