"""A test whose tool is absent is skipped with the reason, and fails where all must run."""

import sys

import pytest
from tools import need_program


def test_a_program_is_found_by_path_or_name() -> None:
    assert need_program("nothing-of-this-name", sys.executable) == sys.executable
    assert need_program("sh", "/nowhere/sh").endswith("/sh")


def test_without_a_program_the_test_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CABOCHON_TEST_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nothing-of-this-name is not installed: run `make"):
        need_program("nothing-of-this-name")


def test_where_all_must_run_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_TEST_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="nothing-of-this-name is not installed"):
        need_program("nothing-of-this-name")
