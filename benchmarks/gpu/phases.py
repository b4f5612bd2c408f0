"""Runs phases, each a program of its own that prints rows as JSON lines, and keeps every row at once.

A GPU error poisons a whole process, and a hung kernel never returns: hence processes, killed at their limit.
What is not a row in a phase's output is passed on to the terminal.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Literal

Row = dict[str, object]
Status = Literal["ok", "failed", "timeout", "absent", "skipped"]

ROOT = Path(__file__).resolve().parents[2]
LEAST_S = 5.0  # with less time left, a phase is not started
MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A program and its time limit. absent: why it cannot run on this machine. env: beside everybody's."""

    name: str
    argv: tuple[str, ...]
    limit_s: float
    is_check: bool = False  # its failure is wrong results, not a missing number
    absent: str | None = None
    env: tuple[tuple[str, str], ...] = ()


class RowFile:
    """Rows of one run, appended to a file: flushed one by one, so that the end of the machine loses none."""

    def __init__(self, path: Path, stamp: Row) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self._file = path.open("a", encoding="utf-8")
        self._stamp = stamp

    def write(self, phase: str, row: Row) -> None:
        """Append a row with the stamp of all, which wins, and its phase."""
        stamped: Row = {**self._stamp, "phase": phase, **row, **self._stamp}
        self.rows.append(stamped)
        self._file.write(json.dumps(stamped) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is lost without it."""
        self._file.close()


def run_all(
    phases: list[Phase],
    env: dict[str, str],
    file: RowFile,
    budget_s: float,
    show: Callable[[str], None] = print,
) -> list[str]:
    """Run phases in order until the budget is spent. Returns the checks that proved nothing.

    A phase that did not run to its end leaves a row that says why.
    """
    ends_s = time.monotonic() + budget_s
    unproven = []
    for phase in phases:
        left_s = ends_s - time.monotonic()
        started_s = time.monotonic()
        status, error, message = run_phase(phase, min(phase.limit_s, left_s), env, file, show)
        seconds = round(time.monotonic() - started_s, 1)
        file.write(phase.name, {"status": status, "seconds": seconds, "error": error, "message": message})
        show(f"== {phase.name}: {status} {seconds} s{f' {error}: {message}' if error or message else ''}")
        is_wrong = error == "AssertionError"  # a benchmark checks what it times, too
        if is_wrong or (phase.is_check and status not in ("ok", "absent")):
            unproven.append(f"{phase.name}: {status}")
    return unproven


def run_phase(
    phase: Phase, limit_s: float, env: dict[str, str], file: RowFile, show: Callable[[str], None] = print
) -> tuple[Status, str | None, str | None]:
    """Run one phase. Returns how it ended, and the class and message of its error."""
    if phase.absent is not None:
        return "absent", None, phase.absent
    if limit_s < LEAST_S:
        return "skipped", None, "no time left"
    show(f"== {phase.name}")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        try:
            process = subprocess.Popen(
                phase.argv, env={**env, **dict(phase.env)}, stdout=subprocess.PIPE, stderr=complaints,
                text=True, encoding="utf-8", errors="replace", start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        except OSError as error:
            return "failed", type(error).__name__, str(error)
        assert process.stdout is not None
        is_over: list[bool] = []
        timer = Timer(limit_s, lambda: (is_over.append(True), _kill(process)))
        timer.start()
        texts: deque[str] = deque(maxlen=5)
        try:
            for row, text in _parsed(process):
                if row is not None:
                    file.write(phase.name, row)
                else:
                    texts.append(text)
                    show(f"   {text}")
            status = process.wait()
        finally:
            timer.cancel()
            _kill(process)  # what it left running holds the GPU's memory
            process.stdout.close()
        if is_over:
            return "timeout", "TimeoutError", f"not finished after {limit_s:.0f} s"
        if status == 0:
            return "ok", None, None
        complaints.seek(0)
        error, message = last_error(complaints.read())
        return "failed", error or "ExitStatus", message or "\n".join(texts) or f"exit status {status}"


def last_error(text: str) -> tuple[str | None, str | None]:
    """Class and message of the last exception in a program's complaints."""
    for line in reversed(text.splitlines()):
        name, separator, message = line.partition(":")
        if separator and name and not name[0].isspace() and " " not in name and name[-1].isalnum():
            last = name.rpartition(".")[2]
            if last[:1].isupper() and last.endswith(("Error", "Exception", "Resources", "Interrupt")):
                return last, message.strip()[:MESSAGE_CHARS]
        elif line == "AssertionError":
            return line, None
    return None, text.strip()[-MESSAGE_CHARS:] or None


def _parsed(process: "subprocess.Popen[str]") -> Iterator[tuple[Row | None, str]]:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield (row if isinstance(row, dict) else None), line.rstrip()


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def python(script: Path, *args: object) -> tuple[str, ...]:
    """The command line of a script under this Python."""
    return (sys.executable, str(script), *map(str, args))
