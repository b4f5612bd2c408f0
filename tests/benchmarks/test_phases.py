"""How a GPU check runs its phases: rows at once, limits that hold, failures that stop nothing else."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from phases import Phase, Row, RowFile, last_error, python, run_all

ENV = dict(os.environ)


def phase(code: str, *, limit_s: float = 30, **options: object) -> Phase:
    defaults = {"name": "one", "argv": (sys.executable, "-c", code), "limit_s": limit_s}
    return Phase(**{**defaults, **options})


def run(path: Path, *phases: Phase, budget_s: float = 60) -> tuple[bool, list[Row], list[str]]:
    shown: list[str] = []
    file = RowFile(path / "rows.jsonl", {"run": "a run"})
    is_right = not run_all(list(phases), ENV, file, budget_s, shown.append)
    file.close()
    return is_right, [json.loads(line) for line in (path / "rows.jsonl").read_text().splitlines()], shown


def test_rows_are_stamped_and_other_lines_are_passed_on(tmp_path: Path) -> None:
    _, rows, shown = run(tmp_path, phase("print('{\"a\": 1}'); print('hello'); print('3')"))
    assert rows[0] == {"run": "a run", "phase": "one", "a": 1}
    assert rows[1]["status"] == "ok"
    assert [line for line in shown if line.startswith("   ")] == ["   hello", "   3"]


def test_a_row_is_in_the_file_while_its_phase_still_runs(tmp_path: Path) -> None:
    """The program itself reads the file that its row went to."""
    read = f"n = pathlib.Path({str(tmp_path / 'rows.jsonl')!r}).read_text().count('a run')"
    code = f"import json, pathlib, time; print('{{}}', flush=True); time.sleep(0.5); {read}"
    code += "; print(json.dumps({'n': n}))"
    _, rows, _ = run(tmp_path, phase(code))
    assert rows[1]["n"] == 1


def test_a_failure_leaves_its_class_and_message_and_the_rest_goes_on(tmp_path: Path) -> None:
    failing = phase("print('{\"a\": 1}', flush=True); raise ValueError('too small: 3')")
    _, rows, _ = run(tmp_path, failing, phase("print('{\"b\": 2}')"))
    assert (rows[1]["status"], rows[1]["error"], rows[1]["message"]) == (
        "failed",
        "ValueError",
        "too small: 3",
    )
    assert rows[2]["b"] == 2


@pytest.mark.parametrize(
    ("code", "is_check", "is_right"),
    [
        ("raise ValueError", False, True),  # a number is missing
        ("raise ValueError", True, False),
        ("assert False", False, False),  # a benchmark that found its kernel wrong
        ("pass", True, True),
    ],
)
def test_wrong_results_are_told_from_missing_numbers(
    tmp_path: Path, code: str, is_check: bool, is_right: bool
) -> None:
    assert run(tmp_path, phase(code, is_check=is_check))[0] is is_right


def test_a_phase_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; print('{\"a\": 1}', flush=True)\n"
        f"child = subprocess.Popen(['sleep', '60']); open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    started_s = time.monotonic()
    is_right, rows, _ = run(tmp_path, phase(code, limit_s=5, is_check=True))
    assert time.monotonic() - started_s < 20
    assert rows[0]["a"] == 1
    assert (rows[1]["status"], rows[1]["message"]) == ("timeout", "not finished after 5 s")
    assert not is_right, "a check without an end proves nothing"
    assert _is_gone(int(pid_file.read_text()))


def _is_gone(pid: int) -> bool:
    """Dead, or dead and not yet buried by whoever inherited it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_without_time_left_a_phase_is_skipped(tmp_path: Path) -> None:
    is_right, rows, _ = run(tmp_path, phase("pass"), phase("pass", is_check=True), budget_s=1)
    assert [row["status"] for row in rows] == ["skipped", "skipped"]
    assert not is_right


def test_an_absent_phase_says_why_and_is_no_failure(tmp_path: Path) -> None:
    is_right, rows, _ = run(tmp_path, phase("assert False", is_check=True, absent="no such tool"))
    assert is_right
    assert (rows[0]["status"], rows[0]["message"]) == ("absent", "no such tool")


def test_a_program_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    _, rows, _ = run(tmp_path, phase("", argv=("/no/such/program",)))
    assert (rows[0]["status"], rows[0]["error"]) == ("failed", "FileNotFoundError")


def test_a_phase_has_its_own_environment_beside_everybodys(tmp_path: Path) -> None:
    code = "import os, json; print(json.dumps({'x': os.environ['X'], 'path': bool(os.environ['PATH'])}))"
    _, rows, _ = run(tmp_path, phase(code, env=(("X", "7"),)))
    assert (rows[0]["x"], rows[0]["path"]) == ("7", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory",
            ("OutOfMemoryError", "CUDA out of memory"),
        ),
        ("ValueError: a: b\nsome warning", ("ValueError", "a: b")),
        ("AssertionError", ("AssertionError", None)),
        ("killed by the driver", (None, "killed by the driver")),
        ("", (None, None)),
    ],
)
def test_the_last_error_of_a_program(text: str, expected: tuple[str | None, str | None]) -> None:
    assert last_error(text) == expected


def test_a_script_runs_under_this_python() -> None:
    assert python(Path("a.py"), "--n", 3) == (sys.executable, "a.py", "--n", "3")
