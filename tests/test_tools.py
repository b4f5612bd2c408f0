"""A test whose tool is absent is skipped with the reason, and fails where all must run."""

import sys
from pathlib import Path
from typing import Any

import pytest
import tools
from tools import need_deploy_tools, need_gateway_tools, need_package, need_program

ABSENT = [(need_package, "no_such_package", "make clients"), (need_program, "no-such-program", "run `make")]


def test_a_program_is_found_by_path_or_name() -> None:
    assert need_program("nothing-of-this-name", sys.executable) == sys.executable
    assert need_program("sh", "/nowhere/sh").endswith("/sh")


def test_a_package_that_is_there_is_given() -> None:
    assert need_package("json").loads("[1]") == [1]


@pytest.mark.parametrize(("need", "name", "remedy"), ABSENT)
def test_without_its_tool_a_test_skips_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, need: Any, name: str, remedy: str
) -> None:
    monkeypatch.delenv("CABOCHON_TEST_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"{name} is not installed: {remedy}"):
        need(name)


@pytest.mark.parametrize(("need", "name", "remedy"), ABSENT)
def test_where_all_must_run_it_fails(
    monkeypatch: pytest.MonkeyPatch, need: Any, name: str, remedy: str
) -> None:
    monkeypatch.setenv("CABOCHON_TEST_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match=f"{name} is not installed: {remedy}"):
        need(name)


@pytest.mark.parametrize(
    ("must_run", "outcome"),
    [("0", pytest.skip.Exception), ("1", pytest.fail.Exception)],
    ids=["skip", "fail"],
)
@pytest.mark.parametrize(
    ("need", "folder", "remedy"),
    [
        (need_gateway_tools, "GATEWAY_TOOLS", "Envoy is not installed: make gateway-tools"),
        (
            need_deploy_tools,
            "DEPLOY_TOOLS",
            "hadolint, shellcheck, checkov and uv are not installed: make deploy-tools",
        ),
    ],
    ids=["gateway", "deploy"],
)
def test_without_an_environment_of_tools_a_test_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    need: Any,
    folder: str,
    remedy: str,
    must_run: str,
    outcome: type[Exception],
) -> None:
    monkeypatch.setenv("CABOCHON_TEST_ALL", must_run)
    monkeypatch.setattr(tools, folder, tmp_path / "bin")
    with pytest.raises(outcome, match=remedy):
        need()
    (tmp_path / ".installed").touch()
    assert need() == tmp_path / "bin"
