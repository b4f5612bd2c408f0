"""`cabochon serve`: engine process, app and uvicorn in one process, from start to drained end. No Ray."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from tqdm import tqdm

from cabochon.engine.client import EngineClient
from cabochon.engine.models.source import locate
from cabochon.server.app import build_app
from cabochon.server.prompts import load_prompts
from cabochon.server.service import VERSION, Service
from cabochon.server.settings import Settings

logger = logging.getLogger(__name__)

DEAD_ENGINE_EXIT_S = 5.0  # time for open requests to get their error, and for probes to see 503
CLOSE_TIMEOUT_S = 5


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: SIGTERM must drain before the socket closes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def find_model(settings: Settings) -> Path:
    """The model's directory; downloads or converts if it must."""
    engine = settings.engine
    return await asyncio.to_thread(locate, engine.model, revision=engine.revision, cache_dir=engine.cache_dir)


async def start_engine(settings: Settings, directory: Path) -> EngineClient:
    """Spawn the engine and wait until it is ready, with a progress bar after a second."""
    client = EngineClient(settings.engine, directory, step_timeout_s=settings.server.step_timeout_s)
    with tqdm(desc="Loading weights", unit="", unit_scale=True, delay=1, leave=False) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        await client.start(on_progress)
    return client


async def serve(settings: Settings) -> int:
    """Run until a signal or the engine's death. Returns the exit code."""
    directory = await find_model(settings)
    prompts = asyncio.create_task(asyncio.to_thread(load_prompts, directory, settings.server))
    client = await start_engine(settings, directory)
    service = Service(client, await prompts, settings.server)
    client.on_step(lambda step: service.metrics.observe_step(step.stats))
    server = _Uvicorn(
        uvicorn.Config(
            build_app(service),
            host=settings.server.host,
            port=settings.server.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
    )
    end = _End(client, service, server)
    watch = asyncio.create_task(end.watch())
    try:
        await server.serve()
    finally:
        watch.cancel()
        await client.shutdown()
    return end.exit_code


class _End:
    """How the server ends: drained after a signal, at once after a second one, or because the engine died."""

    def __init__(self, client: EngineClient, service: Service, server: uvicorn.Server) -> None:
        self._client = client
        self._service = service
        self._server = server
        self._drain: asyncio.Task[None] | None = None
        self.exit_code = 0

    async def watch(self) -> None:
        """Announce readiness, then look for signals and the engine's death."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        while not self._server.started:
            await asyncio.sleep(0.01)
        _print_banner(self._client, self._service, self._server)
        while self._client.dead_reason() is None:
            await asyncio.sleep(0.1)
        if self._drain is None:
            self.exit_code = 1
            await asyncio.sleep(DEAD_ENGINE_EXIT_S)
            self._server.should_exit = True

    def _on_signal(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_and_exit())
        else:
            logger.warning("second signal, ending at once")
            self._server.should_exit = self._server.force_exit = True

    async def _drain_and_exit(self) -> None:
        logger.info("draining open_requests=%d", self._service.lifecycle.num_open)
        is_clean = await self._service.lifecycle.drain()
        logger.info("drained clean=%s", is_clean)
        await self._client.shutdown()  # ends what is left with an error
        self._server.should_exit = True


def _print_banner(client: EngineClient, service: Service, server: uvicorn.Server) -> None:
    info = client.info
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    url = f"http://{host}:{port}/v1"
    note = (
        "  Gemma 3 270M: small, pretrained, not instruction-tuned; Gemma's terms apply\n"
        if info.model == "demo"
        else ""
    )
    print(
        f"\n  Cabochon {VERSION}\n{note}"
        f"  model     {info.model} ({info.architecture}, {info.dtype}, {info.weight_bytes / 2**30:.2f} GiB of weights)\n"
        f"  device    {info.device}, attention {info.attention_backend}\n"
        f"  KV cache  {info.kv_capacity_tokens:,} tokens in {info.kv_bytes / 2**30:.2f} GiB;"
        f" a request has up to {info.max_model_len:,}\n"
        f"  ready at  {url}\n",
        flush=True,
    )
