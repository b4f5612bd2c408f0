"""A server over FakeEngine: in this process for most tests, or as a program (see main).

FakeEngine answers with the prompt's own tokens, so every expected text can be worked out by hand.
"""

import asyncio
import contextlib
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from tiny_tokenizer import tiny_tokenizer

from cabochon.engine.fake import FakeEngine, FakeFaults
from cabochon.server import serve
from cabochon.server.app import build_app
from cabochon.server.config import ServerConfig
from cabochon.server.prompts import make_prompts
from cabochon.server.service import Service
from cabochon.server.tracing import start_tracing

if TYPE_CHECKING:
    from cabochon.server.armor.config import ArmorConfig
    from cabochon.server.spans import Tracing

TOKENIZER = tiny_tokenizer()
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# A pool of httpx (httpcore 1.0) may close, as one too many to keep, a connection that it has just given to
# another thread: "[Errno 9] Bad file descriptor" (encode/httpcore issue 1110). Without limits none is too
# many; one that has idled for 5 s may still meet that.
NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def fake_service(
    engine: FakeEngine | None = None,
    *,
    lora_dir: Path | None = None,
    tracing: "Tracing | None" = None,
    **options: Any,
) -> Service:
    """lora_dir: as EngineConfig's. options: fields of ServerConfig."""
    config = ServerConfig(**options)
    prompts = make_prompts(tiny_tokenizer(), Path("/nonexistent"), config)
    return Service(
        engine or FakeEngine(), prompts, config, lora_dir=lora_dir and str(lora_dir), tracing=tracing
    )


def fake_app(engine: FakeEngine | None = None, **options: Any) -> FastAPI:
    return build_app(fake_service(engine, **options))


class _QuickServer(uvicorn.Server):
    """Looks for its end every 5 ms instead of 100. `guard`: of its service, begun on its loop."""

    guard: "tuple[Service, ArmorConfig] | None" = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.guard is not None:
            from cabochon.server.armor.start import start_guard  # its package is optional

            await start_guard(*self.guard)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.guard is not None:
            await self.guard[0].close()

    async def main_loop(self) -> None:
        while not self.should_exit:
            await asyncio.sleep(0.005)


class LiveServer:
    """uvicorn in a thread, with the engine and the service within reach."""

    def __init__(
        self,
        around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
        armor: "ArmorConfig | None" = None,
        **options: Any,
    ) -> None:
        """around: what the app is mounted in. armor: with a guard. options: of fake_service."""
        self.service = fake_service(**options)
        assert isinstance(self.service.engine, FakeEngine)
        self.engine = self.service.engine
        self.faults = self.engine.faults
        app = around(build_app(self.service))
        self._server = _QuickServer(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off")
        )
        self._server.guard = None if armor is None else (self.service, armor)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # no TLS: saves 50 ms
        self.http = httpx.Client(base_url=self.url, timeout=10, limits=NO_LIMITS, verify=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.faults.is_paused = False
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        return self.post(CHAT, {"messages": [{"role": "user", "content": text}], **fields})

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post(COMPLETIONS, {"prompt": prompt, **fields})

    @contextlib.contextmanager
    def stream(self, path: str, body: Any) -> Iterator[httpx.Response]:
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            yield answer

    def raw(self, head: str, body: bytes = b"") -> bytes:
        """Bytes as they are, for what no client library sends. Returns all until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(head.replace("\n", "\r\n").encode() + body)
            parts = []
            while part := sock.recv(65536):
                parts.append(part)
            return b"".join(parts)


def request_bytes(path: str, body: object) -> bytes:
    content = json.dumps(body).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + content


def events(answer: httpx.Response) -> list[Any]:
    """The JSON of all events but [DONE], which must be last unless an error is."""
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    if lines[-1] == "data: [DONE]":
        lines.pop()
    else:
        assert "error" in json.loads(lines[-1][6:])
    return [json.loads(line[6:]) for line in lines]


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    """Poll until `condition()` is true. Fails after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def main() -> None:
    """The program: argv[1] is {"faults": fields of FakeFaults, "server": fields of ServerConfig} in JSON."""
    logging.basicConfig(level=logging.INFO)
    options = json.loads(sys.argv[1])
    serve.DEAD_ENGINE_EXIT_S = 0.5
    engine = FakeEngine(faults=FakeFaults(**options.get("faults", {})))
    server = options.get("server", {})
    service = fake_service(engine, **server, tracing=start_tracing(server.get("otlp_endpoint")))
    sys.exit(asyncio.run(serve.serve_engine(service, serve.bind("127.0.0.1", 0))))


if __name__ == "__main__":
    main()
