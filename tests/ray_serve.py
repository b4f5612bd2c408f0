"""The Serve application on a local Ray, in a child process that does what it is told: no Ray in pytest.

As a program: options as JSON, then a line of JSON for each command; it answers each with a line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

import httpx
import openai
import psutil
from fake_server import NO_LIMITS

PORT, PROXY_PORT = 18000, 18100
START_S = 120
END_S = 60
REPLICA = "ray::ServeReplica"
READY, FAILED = "ready", "failed: "


class RayServe:
    """A child with Ray and Serve; the application comes and goes. Everything has ended with the context."""

    def __init__(self, **options: Any) -> None:
        """options: of the application; all replicas are on this machine."""
        self._options = {"port": PORT, "replicas_per_node": options.get("num_replicas", 1), **options}
        self.is_deployed = False

    def __enter__(self) -> "RayServe":
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("CABOCHON_", "RAY_"))
        }
        env |= {"RAY_AUTH_MODE": "disabled"}  # or it writes a token into the home directory
        self._log = tempfile.TemporaryFile()
        self._process = psutil.Popen(
            [sys.executable, __file__, json.dumps(self._options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        self._hear()
        return self

    def __exit__(self, *_: object) -> None:
        children = self._process.children(recursive=True)
        self._process.stdin.close()
        with suppress(psutil.TimeoutExpired):
            self._process.wait(END_S)
        for process in (self._process, *children):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.stdout.close()
        self._log.close()

    def deploy(self, **changes: Any) -> str:
        """READY when the replicas are, or FAILED and why. changes: of the options."""
        self.start_deploy(**changes)
        return self.end_deploy()

    def start_deploy(self, **changes: Any) -> None:
        """Returns at once; an application that runs is replaced, one replica after the other."""
        self._send({"deploy": {**self._options, **changes}})

    def end_deploy(self) -> str:
        """As `deploy`."""
        answer = self._hear()
        self.is_deployed = answer == READY
        return answer

    def start_delete(self) -> None:
        """Returns at once; `end_delete` waits for the end of the replicas."""
        self._send({"delete": {}})

    def end_delete(self) -> None:
        self._hear()
        self.is_deployed = False

    def settle(self) -> None:
        """Returns when Serve counts all replicas as running: some time after they have begun to answer."""
        self._send({"settle": {}})
        assert self._hear() == READY

    def replica(self, index: int) -> psutil.Process:
        """The process that listens on a replica's port."""
        (process,) = (
            process
            for process in self._process.children(recursive=True)
            if process.cmdline()[:1] and process.cmdline()[0].startswith(REPLICA)
            and any(c.laddr.port == PORT + index for c in process.net_connections() if c.status == "LISTEN")
        )  # fmt: skip
        return process

    def engine(self, index: int) -> psutil.Process:
        (process,) = (p for p in self.replica(index).children() if "cabochon.engine.process" in p.cmdline())
        return process

    def output(self) -> str:
        """What Ray and the replicas have written."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _send(self, command: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        while line := self._process.stdout.readline():
            if line.startswith((READY, FAILED)):
                return str(line.rstrip("\n"))
        raise AssertionError(f"the child has ended:\n{self.output()}")


class Replica:
    """One replica's port as clients see it."""

    def __init__(self, index: int) -> None:
        self.url = f"http://127.0.0.1:{PORT + index}"
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=NO_LIMITS)

    def __enter__(self) -> "Replica":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def health(self, path: str = "/health") -> int:
        """Status; 0 if nobody answers."""
        try:
            return httpx.get(self.url + path, timeout=5).status_code
        except httpx.TransportError:
            return 0

    def metric(self, name: str) -> float:
        (line,) = (
            line for line in self.http.get("/metrics").text.splitlines() if line.startswith(f"vllm:{name}{{")
        )
        return float(line.rpartition(" ")[2])


def main() -> None:
    from cabochon.server.ray_local import LocalServe
    from cabochon.server.settings import load_arguments, set_ray_environment

    settings = load_arguments(json.loads(sys.argv[1]))
    set_ray_environment(settings)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        local = LocalServe(settings, folder, PROXY_PORT)
        print(READY, flush=True)
        try:
            for line in sys.stdin:
                ((command, args),) = json.loads(line).items()
                try:
                    if command == "deploy":
                        local.deploy(args)
                    elif command == "delete":
                        local.delete()
                    else:
                        wait_running(settings.ray.num_replicas or 1)
                    print(READY, flush=True)
                except Exception as error:  # whatever it is, the test is told
                    print(FAILED + str(error).replace("\n", " "), flush=True)
        finally:
            local.stop()


def wait_running(replicas: int) -> None:
    from ray import serve

    from cabochon.server.deployment import NAME

    end_s = time.monotonic() + START_S
    while serve.status().applications[NAME].deployments[NAME].replica_states != {"RUNNING": replicas}:
        assert time.monotonic() < end_s, serve.status()
        time.sleep(0.1)


if __name__ == "__main__":
    main()
