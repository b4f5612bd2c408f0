"""What a search may choose: options of the engine and values, as flags and as a kustomize component."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import yaml

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError

Value = int | float | str | bool
Space = dict[str, list[Value]]
Flags = dict[str, Value]
ONLY_ON_GPU, ONLY_ON_CPU = "fp8", "int8"
DEFAULT_KV_GIB = 2.0  # what EngineConfig's None means on a CPU


def default_space(device: str, cores: int) -> Space:
    """Options that leave every token as it is. Ranges around the defaults, a factor of two between values."""
    if device == "cuda":
        return {
            "step_tokens": [512, 1024, 2048, 4096, 8192],
            "max_seqs": [32, 64, 128, 256],
            "gpu_memory_utilization": [0.85, 0.9, 0.95],
        }
    return {
        "step_tokens": [128, 256, 512, 1024, 2048],
        "max_seqs": [8, 16, 32, 64, 128],
        "kv_cache_gib": [0.5, 1.0, 2.0, 4.0],
        "threads": [count for count in (1, 2, 4, 8, 16, 32, 64, 128) if count < cores] + [cores],
    }


def approximate_space(device: str) -> Space:
    """Options that buy speed or room with accuracy: what they cost is quantization_quality.py's to say."""
    hints = get_type_hints(EngineConfig)
    absent = ONLY_ON_CPU if device == "cuda" else ONLY_ON_GPU
    space: Space = {}
    for name in ("quantization", "kv_dtype"):
        space[name] = [value for value in get_args(hints[name]) if value != absent]
    return {name: values for name, values in space.items() if len(values) > 1}


def parse_choice(text: str) -> tuple[str, list[Value]]:
    """step_tokens=256,512 as the option and its values. Raises ValueError."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    known = [field.name for field in fields(EngineConfig)]
    if name not in known or not values:
        raise ValueError(
            f"what is searched must be like step_tokens=256,512, got {text}: name an engine option"
        )
    return name, [_value(value) for value in values.split(",")]


def default_flags(space: Space, cores: int) -> Flags:
    """What a server has if it is told nothing; the first value of what only the model knows."""
    settled: Flags = {"threads": cores, "kv_cache_gib": DEFAULT_KV_GIB}
    given = {name: getattr(EngineConfig(), name) for name in space}
    return {
        name: settled.get(name, space[name][0]) if value is None else value for name, value in given.items()
    }


def with_defaults(space: Space, defaults: Flags) -> Space:
    """The space with the defaults in it: the first trial has them."""
    return {
        name: values if defaults[name] in values else [*values, defaults[name]]
        for name, values in space.items()
    }


def refusal(flags: Flags) -> str | None:
    """Why the engine would not start with them, as far as the options themselves say."""
    try:
        options: dict[str, Any] = dict(flags)
        EngineConfig(**options)
    except ConfigError as error:
        return str(error)
    return None


def as_arguments(flags: Mapping[str, Value]) -> list[str]:
    """For `cabochon serve`."""
    return [
        word
        for name, value in flags.items()
        for word in (
            f"--{name.replace('_', '-')}",
            str(value).lower() if isinstance(value, bool) else str(value),
        )
    ]


def component(flags: Mapping[str, Value], comments: Sequence[str]) -> str:
    """A kustomization of deploy/gke: a component that sets the options for all replicas of a site."""
    literals = [f"CABOCHON_{name.upper()}={value}" for name, value in flags.items()]
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "configMapGenerator": [
            {"name": "cabochon-options", "namespace": "cabochon", "behavior": "merge", "literals": literals}
        ],
    }
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.safe_dump(content, sort_keys=False)


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
