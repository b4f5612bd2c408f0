"""The command line: what it prints and how it exits."""

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_tokenizer import tiny_tokenizer

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ModelNotFound
from cabochon.engine.fake import FakeEngine
from cabochon.server import cli
from cabochon.server.service import VERSION
from cabochon.server.settings import Settings


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The commands install a handler."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> object:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["cabochon", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.fixture
def fake_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """A model directory with a tokenizer, and an engine that needs no more."""
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    engine = FakeEngine()

    async def find_model(_settings: Settings) -> Path:
        return tmp_path

    async def start_engine(_settings: Settings, _directory: Path) -> FakeEngine:
        return engine

    monkeypatch.setattr(cli, "find_model", find_model)
    monkeypatch.setattr(cli, "start_engine", start_engine)
    return engine


def test_serve_refuses_options_of_replicas(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "serve", "--num-replicas", "2") == 2
    assert "options of replicas must be given to Ray Serve" in capsys.readouterr().err


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",), ("serve", "--help")])
def test_help_lists_commands_and_options(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *args) == 0
    text = capsys.readouterr().out
    for word in ("serve", "generate", "verify", "adapters", "config", "version", "--max-seqs", "CABOCHON_*"):
        assert word in text


@pytest.mark.parametrize("command", ["version", "--version"])
def test_version_is_printed(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command) == 0
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_config_prints_yaml_that_is_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "config", "--max-seqs", "3", "--served-model-name", "a,b") == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["max_seqs"] == 3
    assert values["served_model_name"] == ["a", "b"]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert run(monkeypatch, "config", "--config", str(file)) == 0
    assert capsys.readouterr().out == text


def test_generate_streams_prompt_and_answer(
    fake_model: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "generate", "hello world", "--max-seqs", "2") == 0
    text = capsys.readouterr().out
    assert text.startswith("hello worldhello worldhello world")
    assert fake_model.seen[0].params.temperature == 0
    assert fake_model.dead_reason() == "the engine was shut down"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("dance",), 2, "dance is not a command"),
        (("generate",), 2, "generate must be followed by a prompt"),
        (("serve", "--max-seq", "2"), 2, "did you mean --max-seqs"),
        (("adapters", "x", "--max-lora", "2"), 2, "did you mean --max-loras"),
        (("config", "--port", "99999"), 2, "port must be in"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(
    args: tuple[str, ...],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *args) == code
    error = capsys.readouterr().err
    assert error.startswith("cabochon: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_model_that_is_not_found_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(_settings: Settings) -> int:
        raise ModelNotFound("no such model: check the name")

    monkeypatch.setattr(cli, "serve", serve)
    assert run(monkeypatch, "serve") == 1
    assert capsys.readouterr().err == "cabochon: no such model: check the name\n"


def test_serve_exits_with_the_servers_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    async def serve(settings: Settings) -> int:
        seen.append(settings)
        return 7

    monkeypatch.setattr(cli, "serve", serve)
    assert run(monkeypatch, "serve", "--port", "1234", "--log-format", "json") == 7
    assert seen[0].server.port == 1234


def test_verify_becomes_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def execv(_path: str, command: list[str]) -> None:
        seen.append(command)
        sys.exit(0)

    monkeypatch.setattr(cli.os, "execv", execv)
    assert run(monkeypatch, "verify", "demo") == 0
    assert seen == [[sys.executable, "-m", "cabochon.engine.models.verify", "demo"]]


@pytest.mark.parametrize(
    ("args", "paths"), [(["a", "b", "--max-loras", "3"], ["a", "b"]), (["--max-loras=3"], [])], ids=str
)
def test_adapters_becomes_another_program_that_has_the_engines_options(
    monkeypatch: pytest.MonkeyPatch, args: list[str], paths: list[str]
) -> None:
    seen: list[list[str]] = []

    def execv(_path: str, command: list[str]) -> None:
        seen.append(command)
        sys.exit(0)

    monkeypatch.setattr(cli.os, "execv", execv)
    assert run(monkeypatch, "adapters", *args) == 0
    ((*start, options), *_) = [command[:4] for command in seen]
    assert start == [sys.executable, "-m", "cabochon.engine.adapters.show"]
    assert json.loads(options) == json.loads(json.dumps(dataclasses.asdict(EngineConfig(max_loras=3))))
    assert seen[0][4:] == paths


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = (
        "import sys; from cabochon.server import cli; sys.argv = ['cabochon', 'config'];"
        "sys.stdin.readline(); cli.main()"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate("\n")
    assert errors == ""
    assert process.returncode == 1
