"""`cabochon serve`: engine process, app and uvicorn in one process, from start to drained end. No Ray."""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from tqdm import tqdm

from cabochon.engine.client import EngineClient
from cabochon.engine.config import EngineConfig, default_topic
from cabochon.engine.engine import Engine
from cabochon.engine.errors import ConfigError
from cabochon.engine.models.source import locate
from cabochon.server.adapters import check_directory
from cabochon.server.app import build_app
from cabochon.server.auth import ApiKeys
from cabochon.server.config import ServerConfig
from cabochon.server.head_limit import LimitedHead
from cabochon.server.prompts import load_prompts
from cabochon.server.service import VERSION, Service
from cabochon.server.settings import Settings, served_names
from cabochon.server.tracing import start_tracing

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048  # connections that wait to be accepted
SPARE_FILES = 256  # files and connections beside those of requests
DEAD_ENGINE_EXIT_S = 5.0  # time for open requests to get their error, and for probes to see 503
CLOSE_TIMEOUT_S = 5  # for the last bytes to slow clients
KEEP_ALIVE_S = 620  # longer than load balancers keep idle connections (Google's: 600), or they meet resets


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
    client = EngineClient(with_topic(settings), directory, step_timeout_s=settings.server.step_timeout_s)
    with tqdm(desc="Loading weights", unit="B", unit_scale=True, delay=1, leave=False, disable=None) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        await client.start(on_progress)
    return client


async def serve(settings: Settings) -> int:
    """Run until a signal or the engine's death. Returns the exit code."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:  # until it serves: nothing is open that could be lost
        loop.add_signal_handler(number, _exit_now, number)
    raise_file_limit(settings.server.max_queued_requests)
    check_files(settings)
    with bind(settings.server.host, settings.server.port) as sock:
        service = await start_service(settings)
        try:
            return await serve_engine(service, sock)
        finally:
            await service.engine.shutdown()


def check_files(settings: Settings) -> None:
    """What a wrong option breaks is found before minutes of loading. Raises ConfigError."""
    ApiKeys(settings.server.api_key_file)
    check_directory(settings.engine.lora_dir)
    if settings.armor.is_on:
        from cabochon.server.armor.start import check_guard  # its package is optional

        check_guard(settings.armor)


async def start_service(settings: Settings) -> Service:
    """A ready engine, with all that the app needs around it. The caller shuts the engine down."""
    tracing = start_tracing(settings.server.otlp_endpoint)
    directory = await find_model(settings)
    prompts = asyncio.create_task(asyncio.to_thread(load_prompts, directory, settings.server))
    engine = asyncio.create_task(start_engine(settings, directory))
    try:
        await asyncio.gather(prompts, engine)
    except BaseException:
        engine.cancel()
        raise
    service = Service(
        engine.result(),
        prompts.result(),
        named(settings),
        lora_dir=settings.engine.lora_dir,
        tracing=tracing,
    )
    if settings.armor.is_on:
        from cabochon.server.armor.start import start_guard  # its package is optional

        try:
            await start_guard(service, settings.armor)
        except BaseException:
            await service.engine.shutdown()
            raise
    return service


def named(settings: Settings) -> ServerConfig:
    """The server's options, the names settled."""
    return dataclasses.replace(settings.server, served_model_name=served_names(settings))


def with_topic(settings: Settings) -> EngineConfig:
    """The engine's options; its events name the model as clients do. Raises ConfigError."""
    engine = settings.engine
    if engine.kv_events_endpoint is None or engine.kv_events_topic is not None:
        return engine
    return dataclasses.replace(engine, kv_events_topic=default_topic(served_names(settings)[0]))


def _exit_now(number: int) -> None:
    """While loading: threads that download or convert would hold up an orderly end."""
    print(f"cabochon: {signal.Signals(number).name} while loading", file=sys.stderr)
    os._exit(128 + number)


def raise_file_limit(num_requests: int) -> None:
    """A connection is a file: without one it is closed unseen, probes included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    needed = num_requests + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        logger.warning("open files limit=%d needed=%d: raise it (ulimit -n)", soft, needed)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket: who connects while the model loads waits. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)  # two that only bind one port do not notice each other
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"host and port must be free to listen on, {host}:{port} is not ({error.strerror}):"
            " choose another port"
        ) from None
    return sock


async def serve_engine(service: Service, sock: socket.socket) -> int:
    """Serve a ready engine on a bound socket until a signal or its death. Returns the exit code."""
    server = _Uvicorn(
        uvicorn.Config(
            build_app(service),
            http=LimitedHead,
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
    )
    gc.collect()
    gc.freeze()  # what is loaded now is permanent: later collections need not walk it
    end = _End(service, server)
    watch = asyncio.create_task(end.watch(sock))
    try:
        await server.serve(sockets=[sock])
    finally:
        watch.cancel()
        await service.engine.shutdown()
        await service.close()
    return end.exit_code


class _End:
    """How the server ends: drained after a signal, at once after a second one, or because the engine died."""

    def __init__(self, service: Service, server: uvicorn.Server) -> None:
        self._engine = service.engine
        self._lifecycle = service.lifecycle
        self._has_ui = service.config.ui
        self._server = server
        self._drain: asyncio.Task[None] | None = None
        self.exit_code = 0

    async def watch(self, sock: socket.socket) -> None:
        """Announce readiness, then look for signals and the engine's death."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        while not self._server.started:
            await asyncio.sleep(0.01)
        _print_banner(self._engine, sock, has_ui=self._has_ui)
        while self._engine.dead_reason() is None:
            await asyncio.sleep(0.1)
        if self._drain is None:
            self.exit_code = 1
            logger.error("engine dead, exit in %g s", DEAD_ENGINE_EXIT_S)
            await asyncio.sleep(DEAD_ENGINE_EXIT_S)
            self._server.should_exit = True

    def _on_signal(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_and_exit())
        else:
            logger.warning("second signal, ending at once")
            self._server.should_exit = self._server.force_exit = True

    async def _drain_and_exit(self) -> None:
        logger.info("draining open_requests=%d", self._lifecycle.num_open)
        is_clean = await self._lifecycle.drain()
        logger.info("drained clean=%s", is_clean)
        self.exit_code = 1 if self._engine.dead_reason() is not None else 0
        await self._engine.shutdown()  # ends what is left with an error
        self._server.should_exit = True


def _print_banner(engine: Engine, sock: socket.socket, *, has_ui: bool) -> None:
    info = engine.info
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    note = (
        "  Gemma 3 270M: small, pretrained, not instruction-tuned; Gemma's terms apply\n"
        if info.model == "demo"
        else ""
    )
    page = f"  try it at {url.removesuffix('v1')}\n" if has_ui else ""
    weights_gib, kv_gib = info.weight_bytes / 2**30, info.kv_bytes / 2**30
    kept = info.dtype if info.quantization == "none" else f"{info.dtype}, weights {info.quantization}"
    print(
        f"\n  Cabochon {VERSION}\n{note}"
        f"  model     {info.model} ({info.architecture}, {kept}, {weights_gib:.2f} GiB of weights)\n"
        f"  device    {info.device}, attention {info.attention_backend}\n"
        f"  KV cache  {info.kv_capacity_tokens:,} tokens in {kv_gib:.2f} GiB;"
        f" a request has up to {info.max_model_len:,}\n"
        f"  ready at  {url}\n{page}\n"
        f"  curl {url}/completions -H 'Content-Type: application/json' \\\n"
        """       -d '{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'\n""",
        flush=True,
    )
