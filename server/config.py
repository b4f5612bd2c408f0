"""Options of the HTTP server: frozen, flat, each with its unit."""

import re
from dataclasses import dataclass
from typing import Literal

from cabochon.engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the server is told. Raises ConfigError on a value out of range."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 in a container
    port: int = 8000  # TCP port; 0: any free one
    served_model_name: tuple[str, ...] = ()  # names clients use instead of the model as given; a,b is two
    api_key_file: str | None = None  # a key per line, read again when it changes; None: no key is asked for
    system_role: Literal["error", "prepend"] = (
        "error"  # for models without one: refuse, or put into the first turn
    )
    chat_template: str | None = None  # jinja file instead of the checkpoint's template
    ui: bool = True  # a page to try the model, at /; without it a 404 there
    max_body_bytes: int = 4 * 2**20  # larger request bodies get 413; more lets one body hold up others longer
    max_queued_requests: int = 1024  # open requests at most, a bound on memory; beyond it 429
    max_queue_wait_s: float = 60.0  # predicted wait above it: 429 with Retry-After
    step_timeout_s: float = 60.0  # work pending and no step for that long: the engine counts as hung
    lame_duck_s: float = 0.0  # after SIGTERM: health says 503, new requests are still served (30 on GKE)
    drain_timeout_s: float = 60.0  # then running requests may finish; at the end they get an error
    otlp_endpoint: str | None = None  # http://collector:4318 gets traces (extra `otel`); None: there are none
    log_format: Literal["plain", "json"] = "plain"  # json: a JSON object per line
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if self.api_key_file == "":
            raise ConfigError("api_key_file must name a file with keys, got an empty name: leave it out")
        if self.otlp_endpoint is not None and not re.fullmatch(r"https?://[^/\s]+\S*", self.otlp_endpoint):
            raise ConfigError(
                f"otlp_endpoint must be an http:// or https:// URL, got {self.otlp_endpoint!r}: correct it"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}: choose another")
        for name in ("max_body_bytes", "max_queued_requests", "max_queue_wait_s", "step_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}: raise it")
        for name in ("lame_duck_s", "drain_timeout_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more seconds, got {getattr(self, name)}: raise it")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """What Ray Serve is told about replicas. Raises ConfigError on a value out of range."""

    num_replicas: int | None = None  # replicas in the cluster; None: 1, or what Serve's own options say
    num_gpus: float | None = None  # GPUs that a replica reserves; None: 1 if device is cuda, else 0
    num_cpus: float = 1.0  # CPUs that a replica reserves, engine included; it is not kept from using more
    replicas_per_node: int = 1  # at most, each on a port of its own; a pod is a node

    def __post_init__(self) -> None:
        for name in ("num_replicas", "replicas_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}: raise it")
        for name in ("num_gpus", "num_cpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1024:
                raise ConfigError(f"{name} must be 0 or more, got {value}: correct it")
