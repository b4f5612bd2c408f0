"""Flag over variable over file over default; what is not an option is named."""

import re
from pathlib import Path

import pytest

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.server.config import ServerConfig
from cabochon.server.settings import (
    Settings,
    as_arguments,
    check_same_environment,
    load_arguments,
    load_settings,
    option_help,
)


def test_defaults_are_those_of_the_configs() -> None:
    assert load_settings([]) == Settings(ServerConfig(), EngineConfig())


def test_a_flag_beats_a_variable_beats_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_seqs: 1\nstep_tokens: 101\nport: 1001\n")
    monkeypatch.setenv("CABOCHON_MAX_SEQS", "2")
    monkeypatch.setenv("CABOCHON_STEP_TOKENS", "102")
    settings = load_settings(["--max-seqs", "3", "--config", str(file)])
    assert settings.engine.max_seqs == 3
    assert settings.engine.step_tokens == 102
    assert settings.server.port == 1001
    assert load_settings([f"--config={file}"]).engine.max_seqs == 2


def test_values_take_the_types_of_their_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_PREFIX_CACHING", "false")
    monkeypatch.setenv("CABOCHON_THREADS", "")
    monkeypatch.setenv("CABOCHON_SERVED_MODEL_NAME", "a,b")
    settings = load_settings(["--kv-cache-gib=0.5", "--max-model-len", "100"])
    assert settings.engine.prefix_caching is False
    assert settings.engine.threads is None
    assert settings.engine.kv_cache_gib == 0.5
    assert settings.engine.max_model_len == 100
    assert settings.server.served_model_name == ("a", "b")


def test_switches_have_two_flags() -> None:
    assert load_settings(["--no-prefix-caching"]).engine.prefix_caching is False
    assert load_settings(["--prefix-caching"]).engine.prefix_caching is True


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("--lora-modules a=/x", ["a=/x"]),
        ("--lora-modules a=/x,b=/y", ["a=/x", "b=/y"]),
        ("--lora-modules=a=/x,b=/y", ["a=/x", "b=/y"]),
        ("--lora-modules a=/x b=/y --port 1", ["a=/x", "b=/y"]),
        ("--lora-modules=a=/x b=/y c=/z", ["a=/x", "b=/y", "c=/z"]),
        ("--lora-modules a=/x --port 1 --lora-modules b=/y", ["a=/x", "b=/y"]),
        ("--lora-modules a=/x,1 b=/y", ["a=/x,1", "b=/y"]),
        ("--lora-modules=a=/x,1 --lora-modules=b=/y", ["a=/x,1", "b=/y"]),
        ("--lora-modules=", []),
        ("--no-ui --lora-modules a=/x --no-prefix-caching", ["a=/x"]),
    ],
)
def test_a_list_is_words_or_one_word_with_commas(flags: str, values: list[str]) -> None:
    assert load_settings(flags.split()).engine.lora_modules == tuple(values)


def test_words_of_a_list_end_at_the_next_flag() -> None:
    flags = "--lora-modules a=/x b=/y --port 7 --served-model-name c d --no-ui"
    settings = load_settings(flags.split())
    assert settings.engine.lora_modules == ("a=/x", "b=/y")
    assert settings.server.served_model_name == ("c", "d")
    assert (settings.server.port, settings.server.ui) == (7, False)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[a=/x, b=/y]", ["a=/x", "b=/y"]),
        ("a=/x,b=/y", ["a=/x", "b=/y"]),
        ("['a=/x,1']", ["a=/x,1"]),
        ("[]", []),
        ("''", []),
    ],
)
def test_a_list_in_a_file_or_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, values: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"lora_modules: {text}\n")
    assert load_settings(["--config", str(file)]).engine.lora_modules == tuple(values)
    monkeypatch.setenv("CABOCHON_LORA_MODULES", "v=/v,w=/w")
    assert load_settings(["--config", str(file)]).engine.lora_modules == ("v=/v", "w=/w")
    assert load_settings(["--lora-modules", "f=/f"]).engine.lora_modules == ("f=/f",)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-seq", "8"], "--max-seq is not an option: did you mean --max-seqs"),
        (["--zzz"], "--zzz is not an option: `cabochon --help` lists them"),
        (["-p", "8"], "-p is not an option"),
        (["--max-seqs"], "expected one argument"),
        (["--max-seqs", "many"], "max_seqs: Input should be a valid integer.* got many"),
        (["extra"], "unrecognized arguments: extra"),
        (["--port", "1", "extra", "--lora-modules", "a=/x"], "unrecognized arguments: extra"),
        (["--lora-modules"], "--lora-modules must be followed by a value: add it"),
        (["--lora-modules", "--port", "1"], "--lora-modules must be followed by a value"),
        (["--lora-modules", "a"], "lora_modules must be NAME=PATH, got a:"),
        (["--lora-modules", "demo=/x"], "must not be a name of the model itself, got demo: choose another"),
        (["--served-model-name=g", "--lora-modules=g=/x"], "must not be a name of the model itself, got g"),
        (["--lora-modules", "a,b=/x", "c=/y"], "a name of lora_modules must have 1 to 256 .*, got a,b"),
        (["--merge-lora", "a=/x", "--lora-modules", "a=/y"], "a name of lora_modules must not be a name of"),
        (["--merge-lora", " a=/x"], "the name of merge_lora must have 1 to 256"),
        (["--device", "tpu"], "device: Input should be 'auto'"),
        (["--port", "99999"], r"port must be in \[0, 65535\], got 99999"),
        (["--page-tokens", "24"], "page_tokens must be a power of two, got 24"),
        (["--kv-cache-gib", "nan"], "kv_cache_gib must be a positive number"),
        (["--config"], "--config must be followed by a file"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml cannot be read"),
    ],
)
def test_wrong_flags_are_named(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(args)


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_MAX_SEQ", "8")
    with pytest.raises(
        ConfigError, match="CABOCHON_MAX_SEQ is not an option: did you mean CABOCHON_MAX_SEQS"
    ):
        load_settings([])


def test_the_switch_of_the_tests_is_no_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_TEST_ALL", "1")
    load_settings([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_seq: 8", "max_seq in .* is not an option: did you mean max_seqs"),
        ("- a", "must hold `option: value` lines, it holds a list"),
        ("a: [", "cannot be read"),
        ("max_seqs: [1]", "max_seqs: Input should be a valid integer"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(["--config", str(file)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": -1}, "port must be in"),
        ({"max_body_bytes": 0}, "max_body_bytes must be positive"),
        ({"max_queued_requests": 0}, "max_queued_requests must be positive"),
        ({"max_queue_wait_s": float("nan")}, "max_queue_wait_s must be positive"),
        ({"step_timeout_s": 0}, "step_timeout_s must be positive"),
        ({"lame_duck_s": -1}, "lame_duck_s must be 0 or more"),
        ({"drain_timeout_s": float("nan")}, "drain_timeout_s must be 0 or more"),
    ],
)
def test_a_server_config_checks_its_ranges(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**options)


def test_help_lists_every_option() -> None:
    text = option_help()
    for name in ("--max-seqs", "--served-model-name", "--drain-timeout-s"):
        assert name in text
    (line,) = [line for line in text.splitlines() if "--lora-modules" in line]
    assert re.split(r"  +", line.strip()) == ["--lora-modules", "A B ... or A,B", "default none"]


@pytest.mark.parametrize(
    "variable",
    [
        ("CABOCHON_SERVICE_HOST", "10.0.0.1"),
        ("CABOCHON_SERVICE_PORT_HTTP", "8000"),
        ("CABOCHON_PORT", "tcp://10.0.0.1:8000"),
        ("CABOCHON_PORT_8000_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_what_kubernetes_adds_for_a_service_of_that_name_is_no_option(
    monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    monkeypatch.setenv("CABOCHON_MAX_SEQS", "7")
    assert load_settings([]).server.port == 8000
    assert load_settings([]).engine.max_seqs == 7


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"model: \xff\xfe\x00\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(["--config", str(file)])


def test_arguments_of_an_application_are_words_or_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"max_seqs": "8", "prefix_caching": "false", "lora_modules": "a=/x,b=/y", "num_gpus": "0.5"}
    typed = {"max_seqs": 8, "prefix_caching": False, "lora_modules": ["a=/x", "b=/y"], "num_gpus": 0.5}
    settings = load_arguments(words)
    assert settings == load_arguments(typed)
    assert (settings.engine.max_seqs, settings.engine.prefix_caching) == (8, False)
    assert (settings.engine.lora_modules, settings.ray.num_gpus) == (("a=/x", "b=/y"), 0.5)
    monkeypatch.setenv("CABOCHON_MAX_SEQS", "4")
    monkeypatch.setenv("CABOCHON_NUM_REPLICAS", "3")
    assert load_arguments(typed).engine.max_seqs == 8
    assert load_arguments({}).engine.max_seqs == 4
    assert load_arguments({}).ray.num_replicas == 3


def test_all_options_come_back_as_arguments() -> None:
    settings = load_settings(["--lora-modules", "a=/x", "--num-replicas=2", "--threads=1", "--no-ui"])
    assert load_arguments(as_arguments(settings)) == settings


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_seq": "8"}, "max_seq is not an option: did you mean max_seqs"),
        ({"max_seqs": "many"}, "max_seqs: Input should be a valid integer.* got many"),
        ({"num_replicas": 0}, "num_replicas must be at least 1, got 0: raise it"),
        ({"replicas_per_node": "0"}, "replicas_per_node must be at least 1, got 0: raise it"),
        ({"num_gpus": -1}, "num_gpus must be 0 or more, got -1.0: correct it"),
        ({"num_cpus": "nan"}, "num_cpus must be 0 or more, got nan: correct it"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_arguments(args)


def test_a_variable_that_only_one_node_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    built = load_arguments({"step_tokens": 100})
    check_same_environment({"step_tokens": 100}, built)
    monkeypatch.setenv("CABOCHON_STEP_TOKENS", "200")
    check_same_environment({"step_tokens": 100}, built)  # the argument beats it there and here
    monkeypatch.setenv("CABOCHON_MAX_SEQS", "8")
    with pytest.raises(ConfigError, match=r"CABOCHON_MAX_SEQS must be the same .* it is 8 here and 64 there"):
        check_same_environment({"step_tokens": 100}, built)
