"""Flags, CABOCHON_* variables and a YAML file, into the frozen configs: only here the environment is read.

Precedence: flag, variable, file, default. A key or variable that is not an option is an error that names it.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import ValidationError, ValidationInfo, create_model, field_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cabochon.engine.config import EngineConfig, split_module
from cabochon.engine.errors import ConfigError
from cabochon.server.adapters import problem_of_name
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.config import RayConfig, ServerConfig

Config = TypeVar("Config", ServerConfig, EngineConfig, RayConfig, ArmorConfig)
CONFIGS = (EngineConfig, ServerConfig, RayConfig, ArmorConfig)
PREFIX = "CABOCHON_"
CONFIG_FLAG = "config"
GOOGLE_LOG_SCOPE = "GOOGLE_SDK_PYTHON_LOGGING_SCOPE"
SERVICE_LINK = re.compile(
    PREFIX + r"(SERVICE_(HOST|PORT\w*)=.*|PORT_\d+_(TCP|UDP|SCTP)\w*=.*|PORT=(tcp|udp|sctp)://.*)", re.DOTALL
)


class Settings(NamedTuple):
    """What the process was told, validated."""

    server: ServerConfig
    engine: EngineConfig
    ray: RayConfig = RayConfig()
    armor: ArmorConfig = ArmorConfig()


def load_settings(args: Sequence[str]) -> Settings:
    """args: flags, such as ["--max-seqs", "8", "--config", "file.yaml"]. Raises ConfigError."""
    file, flags = _take_config_flag(list(args))
    _check_environment()
    return _checked({**_from_file(file), **_from_environment(), **_from_flags(flags)})


def load_arguments(args: Mapping[str, Any]) -> Settings:
    """args: by name, as a Serve application gets them: words from a command line, or typed from YAML.

    They beat variables. Raises ConfigError.
    """
    for name in args:
        if name not in _fields():
            raise ConfigError(_not_an_option(name, sorted(_fields())))
    _check_environment()
    return _checked({**_from_environment(), **args})


def check_same_environment(args: Mapping[str, Any], settings: Settings) -> None:
    """Raises ConfigError if a variable here says other than `settings`, made elsewhere from `args`.

    It would be ignored: the options are those of where the application was built.
    """
    ours, theirs = as_arguments(load_arguments(args)), as_arguments(settings)
    for name in _fields():
        if PREFIX + name.upper() in _environment() and ours[name] != theirs[name]:
            raise ConfigError(
                f"{PREFIX}{name.upper()} must be the same where the application is built and on every node,"
                f" it is {ours[name]} here and {theirs[name]} there: set it on the head too, or in args"
            )


def as_arguments(settings: Settings) -> dict[str, Any]:
    """All options by name, as `load_arguments` takes them."""
    return {name: getattr(config, name) for config in settings for name in _names(type(config))}


def _check_environment() -> None:
    unknown = [name for name in _environment() if name not in _variables()]
    if unknown:
        raise ConfigError(_not_an_option(unknown[0], sorted(_variables())))


def _checked(values: dict[str, Any]) -> Settings:
    try:
        checked = _model()(**values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = first["loc"][0] if first["loc"] else "an option"
        raise ConfigError(f"{name}: {first['msg']}, got {values.get(str(name))}") from None
    given = {name: getattr(checked, name) for name in _fields()}
    settings = Settings(
        _build(ServerConfig, given),
        _build(EngineConfig, given),
        _build(RayConfig, given),
        _build(ArmorConfig, given),
    )
    _check_adapter_names(settings)
    _check_log_scope(settings.armor)
    return settings


def served_names(settings: Settings) -> tuple[str, ...]:
    """Of the model: as given, or a merged adapter's, or the model's own."""
    if settings.server.served_model_name:
        return settings.server.served_model_name
    if settings.engine.merge_lora is not None:
        return (split_module("merge_lora", settings.engine.merge_lora)[0],)
    return (settings.engine.model,)


def _check_adapter_names(settings: Settings) -> None:
    base_names = served_names(settings)
    if settings.engine.merge_lora is not None:
        name, _ = split_module("merge_lora", settings.engine.merge_lora)
        if wrong := problem_of_name(name, ()):
            raise ConfigError(f"the name of merge_lora {wrong}, got {name}: choose another")
    for module in settings.engine.lora_modules:
        name, _ = split_module("lora_modules", module)
        if wrong := problem_of_name(name, base_names):
            raise ConfigError(f"a name of lora_modules {wrong}, got {name}: choose another")


def _check_log_scope(armor: ArmorConfig) -> None:
    if armor.is_on and os.environ.get(GOOGLE_LOG_SCOPE):
        raise ConfigError(
            f"{GOOGLE_LOG_SCOPE} must not be set where Model Armor is asked, it is: unset it,"
            " or Google's client would log prompts"
        )


def set_process_environment() -> None:
    """No third party is told anything, and nobody spins. Before the libraries concerned are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "OMP_WAIT_POLICY" not in os.environ:
        # The engine inherits it. Threads that spin while they wait make a step many times slower as soon as
        # somebody else wants a core; sleeping sooner costs a tenth on an idle machine (docs/decisions.md)
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def set_ray_environment(settings: Settings) -> None:
    """What direct ingress needs, for a Ray that this process starts: its processes inherit it.

    Before ray.serve is imported. On a cluster the same is set on head and workers (docs/ray-serve.md).
    """
    set_process_environment()
    first, server = settings.server.port, settings.server
    for name, value in (
        ("ENABLE_DIRECT_INGRESS", "1"),
        ("DIRECT_INGRESS_MIN_HTTP_PORT", str(first)),
        ("DIRECT_INGRESS_MAX_HTTP_PORT", str(first + settings.ray.replicas_per_node)),  # exclusive
        ("DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", str(server.lame_duck_s)),
        ("PORT_QUARANTINE_S", "0"),
        ("HTTP_PROXY_CALLBACK_IMPORT_PATH", "cabochon.server.fast_path.middlewares"),
        ("RUN_USER_CODE_IN_SEPARATE_THREAD", "0"),  # the app never blocks: saves a hop between loops a token
    ):
        os.environ.setdefault(f"RAY_SERVE_{name}", value)
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 is Ray's: engines would yield to everybody else


def option_help() -> str:
    """All flags with their defaults, one a line."""
    return "\n".join(
        f"  --{name.replace('_', '-'):<22} {_type_name(field.type):<34} default {_shown(field.default)}"
        for name, field in _fields().items()
    )


def _fields() -> dict[str, Any]:
    fields = [field for cls in CONFIGS for field in dataclasses.fields(cls)]
    names = [field.name for field in fields]
    assert len(set(names)) == len(names), "an option is in two configs"
    return {field.name: field for field in fields}


def _build(kind: type[Config], given: dict[str, Any]) -> Config:
    return kind(**{name: given[name] for name in _names(kind)})


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _variables() -> set[str]:
    return {PREFIX + name.upper() for name in _fields()} | {PREFIX + "TEST_ALL"}


def _model() -> type[BaseSettings]:
    fields: dict[str, Any] = {name: (field.type, field.default) for name, field in _fields().items()}
    model: type[BaseSettings] = create_model("CabochonSettings", __base__=_PlainSettings, **fields)
    return model


class _PlainSettings(BaseSettings):
    """Takes values as given: the sources are read one by one, for errors of our own."""

    model_config = SettingsConfigDict(extra="forbid", enable_decoding=False)

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        """A list may be one word, a,b; of several words each is a value, commas and all.

        `null` and an empty variable are no value.
        """
        default = _fields()[str(info.field_name)].default
        if value is False and "off" in get_args(_fields()[str(info.field_name)].type):
            return "off"  # as YAML reads that word
        if isinstance(default, tuple):
            parts = value.split(",") if isinstance(value, str) else value
            if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
                return tuple(part for part in parts if part)
        return default if value in ("", "null", "None") and default is None else value

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # the sources not used are not named
        cls, settings_cls: Any, init_settings: Any, **_: Any
    ) -> Any:
        return (init_settings,)


def _from_environment() -> dict[str, Any]:
    present = _environment()
    given = EnvSettingsSource(_model(), env_prefix=PREFIX)()
    return {name: value for name, value in given.items() if PREFIX + name.upper() in present}


def _environment() -> list[str]:
    """Our variables, without those that Kubernetes adds for a Service that is called cabochon."""
    return [
        name
        for name, value in os.environ.items()
        if name.startswith(PREFIX) and not SERVICE_LINK.fullmatch(f"{name}={value}")
    ]


def _from_flags(flags: list[str]) -> dict[str, Any]:
    for flag in flags:
        name = flag.partition("=")[0]
        if name.startswith("-") and not _is_number(name) and name not in _flags():
            raise ConfigError(_not_an_option(name, _flags()))
    lists, flags = _take_lists(flags)
    try:
        source: Any = CliSettingsSource(
            _model(),
            cli_parse_args=flags,
            cli_exit_on_error=False,
            cli_kebab_case=True,
            cli_implicit_flags=True,
        )
    except SettingsError as error:
        raise ConfigError(f"flags must be --option VALUE: {error}; see `cabochon --help`") from None
    return {**source(), **lists}


def _take_lists(flags: list[str]) -> tuple[dict[str, str | list[str]], list[str]]:
    """The words of list options, which may be several or repeat the flag; and all other flags."""
    options = {f"--{name.replace('_', '-')}": name for name in _fields() if _is_list(name)}
    words: dict[str, list[str]] = {}
    rest: list[str] = []
    taking: list[str] | None = None  # the option whose words these are
    for flag in flags:
        name, _, value = flag.partition("=")
        if name in options:
            taking = words.setdefault(name, [])
            taking += [value] if "=" in flag else []
        elif taking is None or flag.startswith("-"):
            taking = None
            rest.append(flag)
        else:
            taking.append(flag)
    for name, given in words.items():
        if not given:
            raise ConfigError(f"{name} must be followed by a value: add it")
    return {options[name]: given[0] if len(given) == 1 else given for name, given in words.items()}, rest


def _is_list(name: str) -> bool:
    return isinstance(_fields()[name].default, tuple)


def _flags() -> list[str]:
    names = [name.replace("_", "-") for name in (*_fields(), CONFIG_FLAG)]
    switches = [name.replace("_", "-") for name, field in _fields().items() if field.type is bool]
    return [f"--{name}" for name in names] + [f"--no-{name}" for name in switches]


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"--config must name a YAML file, {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `option: value` lines, it holds a {type(content).__name__}")
    for name in content:
        if name not in _fields():
            raise ConfigError(_not_an_option(f"{name} in {path}", sorted(_fields()), str(name)))
    return content


def _take_config_flag(args: list[str]) -> tuple[str | None, list[str]]:
    for index, arg in enumerate(args):
        if arg == f"--{CONFIG_FLAG}":
            if index + 1 == len(args):
                raise ConfigError("--config must be followed by a file: add it")
            return args[index + 1], args[:index] + args[index + 2 :]
        if arg.startswith(f"--{CONFIG_FLAG}="):
            return arg.split("=", 1)[1], args[:index] + args[index + 1 :]
    return None, args


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).isdecimal()


def _not_an_option(given: str, known: Sequence[str], word: str | None = None) -> str:
    close = difflib.get_close_matches(word or given, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`cabochon --help` lists them"
    return f"{given} is not an option: {hint}"


def _shown(default: Any) -> str:
    return "none" if default == () else str(default)


def _type_name(kind: Any) -> str:
    if kind == tuple[str, ...]:
        return "A B ... or A,B"
    name = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    return name.replace("typing.", "")
