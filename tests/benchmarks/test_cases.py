"""What the programs of a GPU check share: one case's failure stops no other, and what is absent says so."""

import json
from collections.abc import Iterator

import pytest
from cases import Absent, Row, need_options, run_cases

from cabochon.engine.errors import ConfigError


def good() -> Iterator[Row]:
    yield {"value": 1 / 3}


def bad(error: Exception) -> Iterator[Row]:
    yield {"value": 1.0}
    raise error


def rows(capsys: pytest.CaptureFixture[str]) -> list[Row]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_case_that_fails_keeps_its_rows_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cases([("a", lambda: bad(RuntimeError("no"))), ("b", good)]) == 1
    assert rows(capsys) == [
        {"case": "a", "value": 1.0},
        {"case": "a", "error": "RuntimeError", "message": "no"},
        {"case": "b", "value": 0.3333},
    ]


def test_wrong_results_end_the_program_last(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="tokens differ"):
        run_cases([("a", lambda: bad(AssertionError("tokens differ"))), ("b", good)])
    assert [row["case"] for row in rows(capsys)] == ["a", "a", "b"]


@pytest.mark.parametrize("error", [Absent("no option"), ConfigError("no option")])
def test_what_cannot_run_here_is_absent_and_no_failure(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cases([("a", lambda: bad(error))]) == 0
    assert rows(capsys)[1] == {"case": "a", "absent": "no option"}


def test_options_that_the_engine_lacks_are_named() -> None:
    need_options("dtype", "device")
    with pytest.raises(Absent, match="EngineConfig has no warp_drive"):
        need_options("dtype", "warp_drive")
