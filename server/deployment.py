"""The Ray Serve application: `serve run cabochon.server.deployment:app_builder model=demo`.

Direct ingress: each replica has an HTTP server on a port of its own, so that who picks a replica picks an
engine. The same app as `cabochon serve`, in an actor; the engine is its child. Serve's limits on requests are
out of the way: the engine admits.
"""

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from cabochon.engine.errors import ConfigError, EngineDead
from cabochon.server.app import build_app
from cabochon.server.autoscaling import autoscaling_stats
from cabochon.server.fast_path import replica
from cabochon.server.ingress import bind_at_once, check_direct_ingress, check_http
from cabochon.server.logs import set_up_logging
from cabochon.server.replica_ports import take_over_ports
from cabochon.server.serve import DEAD_ENGINE_EXIT_S, check_files, raise_file_limit, start_service
from cabochon.server.settings import (
    Settings,
    check_same_environment,
    load_arguments,
    set_process_environment,
)

logger = logging.getLogger(__name__)

NAME = "cabochon"
NO_LIMIT = 10**9  # of requests in a replica: the engine admits, and answers 429
HEALTH_PERIOD_S = 1.0  # Serve asks; three failures replace the replica
HEALTH_TIMEOUT_S = 10.0
POLL_S = 0.25  # how soon a replica notices that Serve drains it
END_S = 5.0  # for last bytes, after the deadline of the drain


def app_builder(args: Mapping[str, Any]) -> Application:
    """args: options by name, from `serve run` or `args:` of serveConfigV2. Raises ConfigError.

    Serve's own options (autoscaling_config, ray_actor_options) may be set for the deployment `cabochon`.
    """
    settings = load_arguments(args)
    check_direct_ingress(settings)
    ray, server = settings.ray, settings.server
    num_gpus = (1.0 if settings.engine.device == "cuda" else 0.0) if ray.num_gpus is None else ray.num_gpus
    options: dict[str, Any] = {} if ray.num_replicas is None else {"num_replicas": ray.num_replicas}
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": ray.num_cpus, "num_gpus": num_gpus},
        max_replicas_per_node=ray.replicas_per_node,
        max_ongoing_requests=NO_LIMIT,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=server.lame_duck_s + server.drain_timeout_s + END_S,
        graceful_shutdown_wait_loop_s=1.0,  # Serve writes a line each time
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        logging_config=LoggingConfig(enable_access_log=False),  # the app writes a line itself
        **options,
    )(serve.ingress()(CabochonReplica))
    return deployment.bind(dict(args), settings)


class CabochonReplica:
    """One engine and its app in a Ray actor. Ready when `__init__` ends; Serve opens the port then."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: Mapping[str, Any], settings: Settings
    ) -> None:
        """Raises ConfigError if this node is not set up for it, before anything is loaded.

        And at the end if the guard cannot be used: Serve then stops the rollout, and shows the reason.
        """
        set_process_environment()
        set_up_logging(settings.server.log_format, settings.server.log_level)
        check_same_environment(args, settings)
        check_http(settings)
        bind_at_once()
        raise_file_limit(settings.server.max_queued_requests)
        check_files(settings)
        self._signed_in = await take_over_ports()
        self._service = await start_service(settings)
        if problem := self._service.lifecycle.problem():
            await self._service.engine.shutdown()
            await self._service.close()
            raise ConfigError(problem)
        self._seen_after_s = settings.server.lame_duck_s
        self._watcher = asyncio.create_task(self._watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it after `__init__`."""
        app = build_app(self._service)
        replica.service = self._service
        gc.collect()
        gc.freeze()  # what is loaded now is permanent: later collections need not walk it
        return app

    async def check_health(self) -> None:
        """Serve calls it all the time. Raises EngineDead if the replica must be replaced.

        In a rollout the first answer lets Serve stop the next old replica, so it waits until probes have
        seen this one: its port is open already. They need as long as they need to see that one ends.
        """
        wait_s, self._seen_after_s = self._seen_after_s, 0.0
        await asyncio.sleep(wait_s)
        if reason := self._service.engine.dead_reason():
            raise EngineDead(reason)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls it for an autoscaling policy."""
        return autoscaling_stats(self._service)

    async def _watch(self) -> None:
        """Drain as soon as Serve does, end as soon as the engine is dead."""
        engine, lifecycle = self._service.engine, self._service.lifecycle
        while engine.dead_reason() is None:
            await asyncio.sleep(POLL_S)
            if await replica.is_draining():
                logger.info("draining open_requests=%d", lifecycle.num_open)
                logger.info("drained clean=%s", await lifecycle.drain())
                await engine.shutdown()  # ends what is left with an error
                return
        logger.error("engine dead, exit in %g s", DEAD_ENGINE_EXIT_S)
        await asyncio.sleep(DEAD_ENGINE_EXIT_S)
        os._exit(1)  # a graceful end would wait for load balancers, and hold the port meanwhile

    async def __del__(self) -> None:
        """Serve calls it at the end, also of a replica that never was ready."""
        with contextlib.suppress(AttributeError):
            self._watcher.cancel()
        with contextlib.suppress(AttributeError):  # each may be missing, if it failed before
            await self._service.engine.shutdown()
            await self._service.close()
