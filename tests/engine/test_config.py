"""Every option out of range is refused with its message; the borders themselves are accepted."""

import dataclasses
import math
import re
from typing import Any

import pytest

from cabochon.engine import config as config_module
from cabochon.engine.config import EngineConfig, default_topic
from cabochon.engine.errors import ConfigError

DTYPE = "dtype must be auto, bf16 or fp32, got {}: Gemma overflows in fp16, use bf16"
KV_DTYPE = "kv_dtype must be auto or fp8, got {}: auto keeps K and V in the working dtype"
PAGE = "page_tokens must be a power of two, got {}: 16 is usual"
SEQS = "max_seqs must be at least 1, got {}: raise it"
STEP = (
    "step_tokens must be at least max_seqs = 64, a token for every running request, got {}:"
    " raise step_tokens or lower max_seqs"
)
LENGTH = "max_model_len must be at least 2 (one in, one out), got {}: raise it"
SHARE = "gpu_memory_utilization must be in (0, 1], got {}: 0.9 is usual"
POOL = "kv_cache_gib must be a positive number of GiB, got {}: correct it"
THREADS = "threads must be at least 1, got {}: leave it out for all cores"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", "fp16", DTYPE),
        ("dtype", None, DTYPE),
        ("kv_dtype", "fp16", KV_DTYPE),
        ("kv_dtype", None, KV_DTYPE),
        ("step_depth", 0, "step_depth must be 1 or 2, got 0: 2 is faster"),
        ("step_depth", 3, "step_depth must be 1 or 2, got 3: 2 is faster"),
        ("quantization", "int4", "quantization must be none, fp8 or int8, got int4: use none"),
        ("page_tokens", 0, PAGE),
        ("page_tokens", -16, PAGE),
        ("page_tokens", 3, PAGE),
        ("page_tokens", 24, PAGE),
        ("max_seqs", 0, SEQS),
        ("max_seqs", -1, SEQS),
        ("step_tokens", 63, STEP),
        ("step_tokens", 0, STEP),
        ("max_model_len", 1, LENGTH),
        ("max_model_len", 0, LENGTH),
        ("max_model_len", -5, LENGTH),
        ("kv_cache_gib", 0, POOL),
        ("kv_cache_gib", -1.5, POOL),
        ("kv_cache_gib", 4096, POOL),
        ("kv_cache_gib", math.nan, POOL),
        ("kv_cache_gib", math.inf, POOL),
        ("kv_cache_gib", -math.inf, POOL),
        ("gpu_memory_utilization", 0, SHARE),
        ("gpu_memory_utilization", 1.01, SHARE),
        ("gpu_memory_utilization", math.nan, SHARE),
        ("threads", 0, THREADS),
        ("threads", -2, THREADS),
    ],
)
def test_a_value_out_of_range_is_refused(option: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message.format(value))}$"):
        EngineConfig(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "auto"),
        ("dtype", "bf16"),
        ("dtype", "fp32"),
        ("kv_dtype", "auto"),
        ("kv_dtype", "fp8"),
        ("page_tokens", 1),
        ("page_tokens", 512),
        ("page_tokens", None),
        ("max_seqs", 1),
        ("max_seqs", 512),
        ("step_tokens", 64),
        ("max_model_len", 2),
        ("max_model_len", None),
        ("kv_cache_gib", 1e-9),
        ("kv_cache_gib", 4095.9),
        ("kv_cache_gib", None),
        ("gpu_memory_utilization", 1),
        ("threads", 1),
        ("threads", None),
    ],
)
def test_the_borders_are_accepted(option: str, value: object) -> None:
    assert getattr(EngineConfig(**{option: value}), option) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_events_endpoint": "*:5557"},
            "kv_events_endpoint must start with tcp:// or ipc://, got *:5557: tcp://*:5557 is usual",
        ),
        *(
            (
                {"kv_events_endpoint": "tcp://*:5557", "kv_events_topic": topic},
                f"kv_events_topic must be kv@POD@MODEL, got {topic}: routers split it at the @",
            )
            for topic in ("", "kv", "kv@pod", "kv@@model", "kv@pod@", "kv@pod@model@1", "pod@model@1")
        ),
        (
            {"kv_events_endpoint": "tcp://*:5557", "prefix_caching": False},
            "kv_events_endpoint must be left out without prefix_caching, which finds no page again, got"
            " tcp://*:5557: leave it out, or turn prefix_caching on",
        ),
    ],
)
def test_events_that_nobody_could_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        EngineConfig(**options)


def test_the_topic_is_the_host_and_the_model_unless_it_cannot_be_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_module.socket, "gethostname", lambda: "pod-1")
    assert default_topic("google/gemma-2-2b-it") == "kv@pod-1@google/gemma-2-2b-it"
    message = (
        "kv_events_topic must be kv@POD@MODEL, got kv@pod-1@a@b from the host's and the model's name: set it"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        default_topic("a@b")


def test_more_running_requests_need_a_larger_step() -> None:
    with pytest.raises(ConfigError, match=r"at least max_seqs = 513, .* got 512"):
        EngineConfig(max_seqs=513)
    assert EngineConfig(max_seqs=513, step_tokens=513).max_seqs == 513


def test_a_changed_copy_is_validated_as_well() -> None:
    with pytest.raises(ConfigError, match="page_tokens must be a power of two"):
        dataclasses.replace(EngineConfig(), page_tokens=20)


def test_nothing_assigns_to_a_config() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().max_seqs = 1  # type: ignore[misc]
