"""Options of the engine: frozen, flat, each with its unit. `auto` and None are settled once, in load.py."""

import socket
from dataclasses import dataclass
from typing import Literal

from cabochon.engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine is told. Raises ConfigError on a value out of range."""

    model: str = "demo"  # demo (Gemma 3 270M), a directory with safetensors, or a Hub id
    revision: str | None = None  # branch, tag or commit of a Hub id
    cache_dir: str | None = None  # where converted demo weights go; None: ~/.cache/cabochon
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cpu, until the GPU path has been tested on one
    dtype: Literal["auto", "bf16", "fp32"] = (
        "auto"  # auto: bf16 where the hardware has it; Gemma overflows in fp16
    )
    attention_backend: Literal["auto", "torch", "native", "triton", "flash-attn"] = (
        "auto"  # auto: triton on a GPU, native (C) on a CPU; flash-attn: its package, an NVIDIA GPU and bf16
    )
    kv_dtype: Literal["auto", "fp8"] = (
        "auto"  # auto: as dtype; fp8 holds nearly twice the tokens, rounded to e4m3; triton only
    )
    quantization: Literal["none", "fp8", "int8"] = (
        "none"  # half the bytes, approximations: fp8 on GPUs of compute capability 8.9 and up, int8 on a CPU
    )
    max_model_len: int | None = None  # tokens of prompt and output; None: the model's, or what the pool holds
    max_seqs: int = 64  # requests that run at once; more makes steps longer
    step_tokens: int = 512  # token budget of a step; larger is faster prefill and longer gaps between tokens
    step_depth: int = 2  # steps on a GPU at once, 1 or 2: with 2 the host prepares one while the other runs
    cuda_graphs: bool = True  # replay decode steps from graphs, which are captured when the engine is idle
    page_tokens: int | None = (
        None  # tokens per KV page, and the granularity of the prefix cache; None: 16, with flash-attn 256
    )
    kv_cache_gib: float | None = (
        None  # GiB of KV pages; more holds more or longer sequences; None: 2 on a CPU, on a GPU what is left
    )
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory for weights, pages and activations
    prefix_caching: bool = True  # share the pages of common prefixes
    lora_modules: tuple[str, ...] = ()  # adapters to serve from the start, NAME=PATH each, in PEFT format
    lora_dir: str | None = None  # adapters below it may be loaded and unloaded over HTTP; None: none may
    max_loras: int = 8  # adapters in one batch, each in a slot of the device; more wait in host memory
    max_lora_rank: int = 64  # of an adapter; on a GPU every slot takes room for it
    merge_lora: str | None = None  # NAME=PATH: add the adapter to the weights, and serve the sum as NAME
    kv_events_endpoint: str | None = (
        None  # address such as tcp://*:5557: readers get the TOKEN IDS of cached pages there; None: off
    )
    kv_events_topic: str | None = (
        None  # kv@POD@MODEL, part of each message; None: this host, the model's name
    )
    threads: int | None = None  # torch threads on CPU; None: the cores this process may use

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bf16", "fp32"):  # a caller in Python may pass anything
            raise ConfigError(
                f"dtype must be auto, bf16 or fp32, got {self.dtype}: Gemma overflows in fp16, use bf16"
            )
        if self.kv_dtype not in ("auto", "fp8"):
            raise ConfigError(
                f"kv_dtype must be auto or fp8, got {self.kv_dtype}: auto keeps K and V in the working dtype"
            )
        if self.quantization not in ("none", "fp8", "int8"):
            raise ConfigError(f"quantization must be none, fp8 or int8, got {self.quantization}: use none")
        if self.page_tokens is not None and (
            self.page_tokens < 1 or self.page_tokens & (self.page_tokens - 1)
        ):
            raise ConfigError(f"page_tokens must be a power of two, got {self.page_tokens}: 16 is usual")
        if self.max_seqs < 1:
            raise ConfigError(f"max_seqs must be at least 1, got {self.max_seqs}: raise it")
        if self.step_tokens < self.max_seqs:
            raise ConfigError(
                f"step_tokens must be at least max_seqs = {self.max_seqs}, a token for every running request,"
                f" got {self.step_tokens}: raise step_tokens or lower max_seqs"
            )
        if self.step_depth not in (1, 2):
            raise ConfigError(f"step_depth must be 1 or 2, got {self.step_depth}: 2 is faster")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len must be at least 2 (one in, one out), got {self.max_model_len}: raise it"
            )
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < 4096:
            raise ConfigError(
                f"kv_cache_gib must be a positive number of GiB, got {self.kv_cache_gib}: correct it"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}: 0.9 is usual"
            )
        for name in ("max_loras", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}: raise it")
        names = [split_module("lora_modules", module)[0] for module in self.lora_modules]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"lora_modules must have names of their own, got {', '.join(names)}: rename one"
            )
        if self.merge_lora is not None:
            split_module("merge_lora", self.merge_lora)
        if self.kv_events_endpoint is not None:
            _check_events(self.kv_events_endpoint, self.kv_events_topic, has_cache=self.prefix_caching)
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}: leave it out for all cores")

    @property
    def num_slots(self) -> int:
        """For adapters; none where there can be no adapter."""
        return self.max_loras if self.lora_modules or self.lora_dir else 0


def _check_events(endpoint: str, topic: str | None, *, has_cache: bool) -> None:
    if not endpoint.startswith(("tcp://", "ipc://")):
        raise ConfigError(
            f"kv_events_endpoint must start with tcp:// or ipc://, got {endpoint}: tcp://*:5557 is usual"
        )
    if topic is not None and not _is_topic(topic):
        raise ConfigError(f"kv_events_topic must be kv@POD@MODEL, got {topic}: routers split it at the @")
    if not has_cache:
        raise ConfigError(
            "kv_events_endpoint must be left out without prefix_caching, which finds no page again, got"
            f" {endpoint}: leave it out, or turn prefix_caching on"
        )


def _is_topic(topic: str) -> bool:
    """Whether routers can tell the pod from the model."""
    parts = topic.split("@")
    return len(parts) == 3 and parts[0] == "kv" and all(parts)


def default_topic(model: str) -> str:
    """Of this host's events. Raises ConfigError if a name has an @."""
    topic = f"kv@{socket.gethostname()}@{model}"
    if not _is_topic(topic):
        raise ConfigError(
            f"kv_events_topic must be kv@POD@MODEL, got {topic} from the host's and the model's name: set it"
        )
    return topic


def split_module(option: str, module: str) -> tuple[str, str]:
    """Name and path of NAME=PATH. Raises ConfigError."""
    name, _, path = module.partition("=")
    if not name or not path:
        raise ConfigError(f"{option} must be NAME=PATH, got {module}: name the adapter and its directory")
    return name, path
