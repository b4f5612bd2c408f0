"""A test without its tool says so, and no green run of all tests lacks one."""

import pytest
from tools import need_package


def test_without_a_package_a_test_skips_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CABOCHON_TEST_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed: make clients"):
        need_package("no_such_package")


def test_without_a_package_a_test_fails_when_all_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_TEST_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="no_such_package is not installed: make clients"):
        need_package("no_such_package")


def test_a_package_that_is_there_is_given() -> None:
    assert need_package("json").loads("[1]") == [1]
