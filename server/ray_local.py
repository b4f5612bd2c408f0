"""The Ray Serve application on this machine alone: `make serve-ray`. Its Ray ends with it."""

import dataclasses
import signal
import sys
import tempfile
import threading
from typing import Any

from cabochon.engine.errors import ConfigError
from cabochon.server.serve import KEEP_ALIVE_S, SIGNALS
from cabochon.server.settings import Settings, as_arguments, load_settings, set_ray_environment

PROXY_PORT = 8100  # Serve's own proxy: it spreads requests over the replicas
STORE_BYTES = 80 * 2**20  # shared memory for Ray's objects, of which there are none: the least that it takes


def main() -> None:
    """Flags of `cabochon serve`, and --num-replicas, which get ports from --port on. Until a signal."""
    try:
        settings = one_node(load_settings(sys.argv[1:]))
    except ConfigError as error:
        print(f"cabochon: {error}", file=sys.stderr)
        sys.exit(2)
    set_ray_environment(settings)
    with tempfile.TemporaryDirectory(prefix="cabochon", ignore_cleanup_errors=True) as folder:
        local = LocalServe(settings, folder)
        try:
            local.deploy(as_arguments(settings))
            first = settings.server.port
            for port in range(first, first + settings.ray.replicas_per_node):
                print(f"  ready at  http://{settings.server.host}:{port}/v1", flush=True)
            _wait_for_signal()
        finally:
            local.stop()


def one_node(settings: Settings) -> Settings:
    """All replicas on this node."""
    return settings._replace(
        ray=dataclasses.replace(settings.ray, replicas_per_node=settings.ray.num_replicas or 1)
    )


class LocalServe:
    """A Ray on this machine with Serve on it. After `set_ray_environment`."""

    def __init__(self, settings: Settings, folder: str, proxy_port: int = PROXY_PORT) -> None:
        """folder: for Ray's sockets and logs; a short path, or the sockets' names become too long."""
        import ray  # here: it reads the environment when it is imported
        from ray import serve

        self._ray, self._serve = ray, serve
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE_BYTES, _temp_dir=folder)
        serve.start(
            http_options={
                "host": settings.server.host,
                "port": proxy_port,
                "keep_alive_timeout_s": KEEP_ALIVE_S,
            }
        )

    def deploy(self, args: dict[str, Any]) -> None:
        """Returns when the replicas are ready."""
        from cabochon.server.deployment import NAME, app_builder  # imports ray.serve

        self._serve.run(app_builder(args), name=NAME, route_prefix="/")

    def delete(self) -> None:
        """Returns when the replicas have drained and ended."""
        from cabochon.server.deployment import NAME

        self._serve.delete(NAME)

    def stop(self) -> None:
        """Drains the replicas first: Serve's own end waits for half a minute at most."""
        self.delete()
        self._serve.shutdown()
        self._ray.shutdown()


def _wait_for_signal() -> None:
    came = threading.Event()
    for number in SIGNALS:
        signal.signal(number, lambda *_: came.set())
    came.wait()
    for number in SIGNALS:  # a second one ends at once
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
