"""Is Ray set up so that a replica's port is the one that pickers and probes know? Before weights are loaded.

Direct ingress is not documented: tests/server/test_ray_contract.py holds the pinned Ray to what is relied on.
"""

import logging
import socket
from types import SimpleNamespace
from typing import Any, NamedTuple

import ray
from ray.serve._private import constants, http_util
from ray.serve.config import HTTPOptions

from cabochon.engine.errors import ConfigError
from cabochon.server.serve import KEEP_ALIVE_S
from cabochon.server.settings import Settings

logger = logging.getLogger(__name__)

CALLBACK = "cabochon.server.fast_path.middlewares"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Rule(NamedTuple):
    """A variable of Ray's, what it is in this process, what it must be, and what for."""

    variable: str
    value: object
    is_right: bool
    must_be: object
    reason: str


def check_direct_ingress(settings: Settings) -> None:
    """Raises ConfigError if a variable of Ray's is not what direct ingress needs, with the mend in it."""
    for rule in _rules(settings):
        if not rule.is_right:
            raise ConfigError(
                f"RAY_SERVE_{rule.variable} must be {rule.must_be} ({rule.reason}), it is {rule.value}:"
                " set it in the environment of every Ray node, head and workers, and start Ray again"
            )


def _rules(settings: Settings) -> list[_Rule]:
    first, end = ports()
    per_node = settings.ray.replicas_per_node
    draining_s = constants.RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S
    callback = constants.RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
    quarantine_s = constants.RAY_SERVE_PORT_QUARANTINE_S
    is_direct = constants.RAY_SERVE_ENABLE_DIRECT_INGRESS
    return [
        _Rule("ENABLE_DIRECT_INGRESS", int(is_direct), is_direct, 1, "a port of its own for each replica"),
        _Rule(
            "DIRECT_INGRESS_MIN_HTTP_PORT",
            first,
            first == settings.server.port,
            settings.server.port,
            "the option port",
        ),
        _Rule(
            "DIRECT_INGRESS_MAX_HTTP_PORT",
            end,
            end == first + per_node,
            first + per_node,
            "exclusive: with a port to spare, a new replica may come up where nobody looks",
        ),
        _Rule(
            "PORT_QUARANTINE_S",
            quarantine_s,
            quarantine_s == 0,
            0,
            "else a new replica finds no port, and loads its weights again and again",
        ),
        _Rule(
            "DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
            draining_s,
            draining_s >= settings.server.lame_duck_s,
            f"{settings.server.lame_duck_s:g} or more",
            "lame_duck_s: load balancers still send requests that long",
        ),
        _Rule(
            "HTTP_PROXY_CALLBACK_IMPORT_PATH",
            callback,
            callback == CALLBACK,
            CALLBACK,
            "or /metrics and /health wait in line with requests",
        ),
    ]


def warn_of_slow_settings(options: HTTPOptions) -> None:
    """What works, but costs."""
    if options.keep_alive_timeout_s < KEEP_ALIVE_S:
        logger.warning(
            "http_options.keep_alive_timeout_s=%d is less than load balancers keep connections: set it to %d",
            options.keep_alive_timeout_s,
            KEEP_ALIVE_S,
        )
    if constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD:
        logger.warning(
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=1 makes each token cross threads: set it to 0"
        )


def ports() -> tuple[int, int]:
    """The ports of this node's replicas, the end exclusive."""
    return (
        constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT,
        constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT,
    )


def check_http(settings: Settings) -> None:
    """In a replica, before its server starts. Raises ConfigError."""
    check_direct_ingress(settings)
    controller = ray.get_actor(constants.SERVE_CONTROLLER_NAME, namespace=constants.SERVE_NAMESPACE)
    options: HTTPOptions = ray.get(controller.get_http_config.remote())
    host = options.host or LOOPBACK[0]
    if host in LOOPBACK and sum(node["Alive"] for node in ray.nodes()) > 1:
        raise ConfigError(
            f"http_options.host must be reachable from other nodes, it is {host}:"
            " set it to 0.0.0.0 in serveConfigV2, or with `serve start --http-host 0.0.0.0`"
        )
    first, end = ports()
    if first <= options.port < end:
        raise ConfigError(
            f"http_options.port must be outside of the replicas' ports {first} to {end - 1},"
            f" it is {options.port}: Serve's own proxy would take it from one, set it to 8100"
        )
    warn_of_slow_settings(options)


def bind_at_once() -> None:
    """Let Serve bind a port on which an ended replica has left connections: the kernel keeps them a minute.

    It binds without SO_REUSEADDR, and never again offers a port that it once could not bind.
    """
    vars(http_util)["socket"] = SimpleNamespace(**{**vars(socket), "socket": _Listener})


class _Listener(socket.socket):
    def bind(self, address: Any) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().bind(address)
