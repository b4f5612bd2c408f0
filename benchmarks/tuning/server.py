"""`cabochon serve` for one trial: started on a free port, waited for, ended."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.05
END_S = 60.0


class ServerFailed(Exception):
    """Why no server came up."""


@contextmanager
def running(arguments: Sequence[str], log: Path, timeout_s: float) -> Iterator[str]:
    """The URL of a server that answers /health. Raises ServerFailed with its last words."""
    port = _free_port()
    command = [sys.executable, "-m", "cabochon.server.cli", "serve", *arguments, "--port", str(port)]
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(child, url, log, timeout_s)
        yield url
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait(child: "subprocess.Popen[bytes]", url: str, log: Path, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if child.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise ServerFailed(f"the server ended: {lines[-1][:300] if lines else 'without a word'}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise ServerFailed(f"/health was not 200 within {timeout_s:g} s: {log} says how far it got")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
