"""A live server whose guard is the real one, asking an emulator in a thread of its own; and its bytes."""

import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from armor_world import PROMPT_TEMPLATE, RESPONSE_TEMPLATE, EmulatorThread
from fake_server import COMPLETIONS, LiveServer, wait_until

from cabochon.engine.fake import FAKE_INFO, FakeEngine
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.verdicts import Stage

LONG_INFO = replace(FAKE_INFO, max_model_len=8192)
HARMLESS = ("slow", "drain", None)  # faults after which a verdict comes that may be relied on


def small_windows(address: str, **options: Any) -> ArmorConfig:
    """Both templates, several windows in a few hundred characters, and a quota that no test meets."""
    given = {
        "armor_prompt_template": PROMPT_TEMPLATE,
        "armor_response_template": RESPONSE_TEMPLATE,
        "armor_endpoint": address,
        "armor_insecure": True,
        "armor_quota_per_min": 100_000,
        "armor_first_window_chars": 48,
        "armor_max_window_chars": 96,
        "armor_hold_back_chars": 16,
        "armor_context_chars": 32,
    }
    return ArmorConfig(**{**given, **options})


def policy_file(path: Path, **policies: Mapping[str, Any]) -> str:
    """A policy for each key, whose name is its key."""
    keys = [{"name": name, "key": name, **options} for name, options in policies.items()]
    path.write_text(yaml.safe_dump({"keys": keys}))
    return str(path)


class Heard(EmulatorThread):
    """Remembers the texts that it was asked about, in the order of its log of calls."""

    def __init__(self, **options: Any) -> None:
        self.texts: list[tuple[Stage, str]] = []
        super().__init__(on_text=lambda stage, text: self.texts.append((stage, text)), **options)

    def forget(self) -> None:
        """Texts, calls and faults."""
        self.emulator.set_faults()
        self.emulator.forget_calls()
        self.texts.clear()

    def passed(self, stage: Stage) -> list[str]:
        """The texts of which it has said that they may pass."""
        calls = [call for call in self.emulator.calls if call.method.startswith("Sanitize")]
        assert len(calls) == len(self.texts)
        return [
            text
            for call, (of_stage, text) in zip(calls, self.texts, strict=True)
            if of_stage == stage and call.result == "ok" and call.fault in HARMLESS
        ]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a client's socket got, and how long it took."""

    raw: bytes
    seconds: float

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1])

    def header(self, name: str) -> str | None:
        head = self.raw.partition(b"\r\n\r\n")[0].decode()
        found = re.search(rf"^{name}: (.*?)\r?$", head, re.IGNORECASE | re.MULTILINE)
        return found[1] if found else None

    @property
    def body(self) -> bytes:
        rest = self.raw.partition(b"\r\n\r\n")[2]
        if self.header("transfer-encoding") != "chunked":
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return body

    @property
    def events(self) -> list[Any]:
        """Of a stream; [DONE] is None."""
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line]
        return [None if line == b"[DONE]" else json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        """Of a completion, streamed or whole; empty for an error."""
        bodies = self.events if self.header("content-type") != "application/json" else [json.loads(self.body)]
        return "".join(one["choices"][0]["text"] for one in bodies if one and one.get("choices"))

    @property
    def error(self) -> dict[str, Any]:
        """That of the status, or of the stream's last event."""
        last = self.events[-1] if self.header("content-type") != "application/json" else json.loads(self.body)
        return dict(last["error"])


def read_all(sock: socket.socket) -> Exchange:
    """Until the server closes."""
    start_s, parts = time.monotonic(), []
    while part := sock.recv(65536):
        parts.append(part)
    return Exchange(b"".join(parts), time.monotonic() - start_s)


class ArmoredServer(LiveServer):
    """FakeEngine with a long context behind the real guard."""

    def __init__(self, armor: ArmorConfig, **options: Any) -> None:
        super().__init__(armor=armor, engine=FakeEngine(LONG_INFO), **options)

    def exchange(self, body: Mapping[str, Any], *, key: str = "", path: str = COMPLETIONS) -> Exchange:
        """All the bytes that come back, until the server closes."""
        with self.open_post(body, key=key, path=path) as sock:
            return read_all(sock)

    def open_post(self, body: Mapping[str, Any], *, key: str = "", path: str = COMPLETIONS) -> socket.socket:
        """A connection that has sent the body."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        sock.sendall(head.encode() + content)
        return sock

    def check_idle(self) -> None:
        """Nothing runs on: no request of the engine, none that a drain would wait for, no call."""
        wait_until(lambda: not self.engine.open and self.service.lifecycle.num_open == 0)
        wait_until(lambda: "cabochon:guard_inflight 0.0" in self.service.scrape()[1].decode())
