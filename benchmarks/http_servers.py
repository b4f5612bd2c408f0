"""Servers that benchmarks ask over HTTP, each a child process, and a client that costs little.

`cabochon serve`, and the Serve application on a Ray of its own (this file as a program: options as JSON, the
proxy's port), which ends with its standard input. CPU seconds are of processes, from /proc.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil

from cabochon.server.ray_local import LocalServe
from cabochon.server.settings import as_arguments, load_arguments, set_ray_environment

READY = re.compile(r"ready at +http://127\.0\.0\.1:(\d+)")
ENGINE = "cabochon.engine.process"
END_S = 90


class Server(NamedTuple):
    """Who listens, which processes are behind it."""

    port: int
    process: psutil.Process  # it speaks HTTP
    engine: psutil.Process
    parent: psutil.Process  # of everything, the same as `process` without Ray


class Timing(NamedTuple):
    """Of one stream, in seconds since it was sent."""

    first_s: float
    last_s: float


@contextlib.contextmanager
def cabochon_serve(options: dict[str, Any]) -> Iterator[Server]:
    """options: of `cabochon serve`. Ready when the context begins."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "cabochon.server.cli", "serve", "--port=0", "--log-level=error", *flags]
    with _child(command) as (parent, port):
        yield Server(port, parent, _engine(parent), parent)


@contextlib.contextmanager
def on_ray(options: dict[str, Any], proxy_port: int) -> Iterator[Server]:
    """options: of the application; one replica. Ready when the context begins."""
    given = {"log_level": "error", "port": free_port(), **options}
    with _child([sys.executable, __file__, json.dumps(given), str(proxy_port)]) as (parent, port):
        (replica,) = (p for p in parent.children(recursive=True) if _listens(p, port))
        yield Server(port, replica, _engine(replica), parent)


def free_port() -> int:
    """Free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def stream(port: int, prompt: str, max_tokens: int) -> Timing:
    """One greedy streamed completion of exactly `max_tokens`, read as bytes.

    Raises AssertionError if it is not whole.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\nConnection: close\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started_s = time.perf_counter()
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    first_s, text = None, bytearray()
    while piece := await reader.read(65536):
        text += piece
        if first_s is None and b"\ndata: {" in text:
            first_s = time.perf_counter() - started_s
    last_s = time.perf_counter() - started_s
    writer.close()
    assert first_s is not None, bytes(text)
    assert b'"finish_reason":"length"' in text, bytes(text[-500:])
    assert b"[DONE]" in text, bytes(text[-500:])
    return Timing(first_s, last_s)


def cpu_s(process: psutil.Process) -> float:
    """User and system time so far; 0 of a process that is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


@contextlib.contextmanager
def _child(command: list[str]) -> Iterator[tuple[psutil.Process, int]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # or Ray writes a token into the home directory
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ports = (int(found[1]) for line in process.stdout if (found := READY.search(line)))
        port = next(ports, None)
        assert port is not None, f"the server ended, start it by hand to see why: {command}"
        yield psutil.Process(process.pid), port
    finally:
        process.stdin.close()
        if "serve" in command:
            process.terminate()
        process.wait(END_S)


def _engine(server: psutil.Process) -> psutil.Process:
    (engine,) = (child for child in server.children() if ENGINE in child.cmdline())
    return engine


def _listens(process: psutil.Process, port: int) -> bool:
    return any(c.laddr.port == port and c.status == "LISTEN" for c in process.net_connections())


def main() -> None:
    settings = load_arguments(json.loads(sys.argv[1]))
    set_ray_environment(settings)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        local = LocalServe(settings, folder, int(sys.argv[2]))
        try:
            local.deploy(as_arguments(settings))
            print(f"ready at http://127.0.0.1:{settings.server.port}", flush=True)
            sys.stdin.read()
        finally:
            local.stop()


if __name__ == "__main__":
    main()
