"""Is Ray set up so that a replica's port is the one that pickers and probes know? Said before weights are loaded.

Direct ingress is not documented: tests/server/test_ray_contract.py holds what is relied on here to the pinned Ray.
"""

import asyncio
import errno
import logging
import socket
from typing import NamedTuple

import ray
from ray.serve._private import constants
from ray.serve.config import HTTPOptions

from cabochon.engine.errors import ConfigError
from cabochon.server.serve import KEEP_ALIVE_S
from cabochon.server.settings import Settings

logger = logging.getLogger(__name__)

CALLBACK = "cabochon.server.fast_path.middlewares"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT_POLL_S = 0.5


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


def ports() -> tuple[int, int]:
    """The ports of this node's replicas, the end exclusive."""
    return (
        constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT,
        constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT,
    )


def check_http(settings: Settings) -> str:
    """In a replica. Returns the address that its server will listen on. Raises ConfigError."""
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
    if options.keep_alive_timeout_s < KEEP_ALIVE_S:
        logger.warning(
            "http_options.keep_alive_timeout_s=%d is shorter than load balancers keep connections: set it to %d",
            options.keep_alive_timeout_s,
            KEEP_ALIVE_S,
        )
    return host


async def ports_free(host: str) -> None:
    """Wait until the kernel has forgotten the connections of replicas that were here before.

    Serve binds without SO_REUSEADDR, and never again offers a port that it once could not bind.
    """
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while remembered := [port for port in range(*ports()) if _is_remembered(host, port)]:
        if loop.time() - started_s < PORT_POLL_S:
            logger.warning("ports=%s have connections of an ended replica: waiting up to 60 s", remembered)
        await asyncio.sleep(PORT_POLL_S)


def _is_remembered(host: str, port: int) -> bool:
    """Whether it cannot be bound although nobody listens on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        try:
            sock.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return False  # Serve will say why
        else:
            return False
    with socket.socket(family) as sock:
        return sock.connect_ex((LOOPBACK[2] if ":" in host else LOOPBACK[0], port)) == errno.ECONNREFUSED
