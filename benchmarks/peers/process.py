"""A peer's process: started, asked, looked at and ended. One at a time works; the others wait for a line."""

import json
import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

END_S = 20.0
KEPT = "HOME", "PATH", "LANG", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"


class PeerFailed(Exception):
    """Why a peer has no figures: it said so, ended or took too long."""


class Answer(NamedTuple):
    """Of one command, timed in the peer's own process."""

    seconds: float
    made: list[int]


class Peer:
    """Loaded when constructed; ends with `close`."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str], timeout_s: float) -> None:
        """Raises PeerFailed. The environment has nothing of ours but what every program needs."""
        self._log = log
        self._timeout_s = timeout_s
        self._rest = b""
        usual = {name: os.environ[name] for name in KEPT if name in os.environ}
        started_s = time.perf_counter()
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={**usual, **environment}, start_new_session=True,
            )  # fmt: skip
        try:
            self.versions: dict[str, str] = self._line()["versions"]
        except BaseException:
            self._child.kill()
            self.close()
            raise
        self.ready_s = time.perf_counter() - started_s  # to a first token

    def run(self, prompts: list[list[int]], output_tokens: int) -> Answer:
        """Raises PeerFailed, also if a prompt did not get all of its tokens."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(
                json.dumps({"prompts": prompts, "output_tokens": output_tokens}).encode() + b"\n"
            )
            self._child.stdin.flush()
        except OSError:
            raise PeerFailed(f"it ended: {self._last_words()}") from None
        answer = Answer(**self._line())
        if answer.made != [output_tokens] * len(prompts):
            raise PeerFailed(f"every prompt must get {output_tokens} tokens, got {answer.made}")
        return answer

    def cpu_s(self) -> float:
        """CPU time of all of its processes until now."""
        times = []
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times.append(sum(process.cpu_times()[:2]))
        return sum(times)

    def memory_bytes(self) -> dict[str, int]:
        """Of all of its processes: resident, and proportional (what is shared counts once)."""
        held = []
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                held.append(process.memory_full_info())
        return {"rss_bytes": sum(one.rss for one in held), "pss_bytes": sum(one.pss for one in held)}

    def close(self) -> None:
        """It and all that it started."""
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)  # its session: children that outlived it
        self._child.wait()

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._child.pid)
            return [root, *root.children(recursive=True)]
        return []

    def _line(self) -> dict[str, Any]:
        """What it says next."""
        assert self._child.stdout is not None
        poll = select.poll()
        poll.register(self._child.stdout, select.POLLIN)
        deadline_s = time.perf_counter() + self._timeout_s
        while b"\n" not in self._rest:
            if not poll.poll(max(0.0, deadline_s - time.perf_counter()) * 1000):
                raise PeerFailed(f"no answer in {self._timeout_s:g} s")
            data = os.read(self._child.stdout.fileno(), 1 << 16)
            if not data:
                raise PeerFailed(f"it ended: {self._last_words()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if "failed" in said:
            raise PeerFailed(said["failed"])
        return said

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "without a word"
