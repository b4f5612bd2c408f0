"""fake_server.py as a process of its own, for signals and ends."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fake_server import wait_until

TESTS = Path(__file__).parent


class ServerProcess:
    """fake_server.py as a child; ended with the context."""

    def __init__(self, **options: Any) -> None:
        command = [sys.executable, str(TESTS / "fake_server.py"), msgspec.json.encode(options).decode()]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self) -> "ServerProcess":
        assert self.process.stdout is not None
        self.banner = ""
        for line in self.process.stdout:
            self.banner += line
            if "curl" in line:
                break
        self.url = next(word for word in self.banner.split() if word.startswith("http"))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stream(self, **fields: Any) -> "Streaming":
        return Streaming(self.url, {"prompt": [300], "stream": True, **fields})


class Streaming(threading.Thread):
    """Reads one stream to its end, in a thread."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__()
        self._request = (url + "/completions", body)
        self.lines: list[str] = []
        self.is_cut = False
        self.start()
        wait_until(lambda: self.lines)

    def run(self) -> None:
        url, body = self._request
        try:
            with httpx.stream("POST", url, json=body, timeout=30) as answer:
                for line in answer.iter_lines():
                    self.lines += [line] if line else []
        except httpx.RemoteProtocolError:
            self.is_cut = True
