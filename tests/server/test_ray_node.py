"""SIGTERM to a Ray node, as a pod gets it: Ray drains the node, Serve its replica, and no client notices."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fake_server import wait_until
from ray_serve import PORT, PROXY_PORT, Replica
from streams import Stream

pytestmark = pytest.mark.slow

GCS_PORT = 6399
LAME_DUCK_S, DRAIN_S = 3, 5
RAY = Path(sys.executable).with_name("ray")
START = [str(RAY), "start", "--block", "--object-store-memory=80000000", "--disable-usage-stats",
         "--min-worker-port=20100", "--max-worker-port=20400"]  # fmt: skip  # by default they may be PORT
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(PORT),
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(PORT + 1),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(LAME_DUCK_S),
    "RAY_SERVE_PORT_QUARANTINE_S": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cabochon.server.fast_path.middlewares",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(LAME_DUCK_S + DRAIN_S + 10),
}
DEPLOY = """
import json, sys
import ray
from ray import serve
from cabochon.server.deployment import app_builder
host, args = sys.argv[1], json.loads(sys.argv[2])
ray.init(log_to_driver=False)
serve.start(http_options={"host": host, "port": %d})
try:
    serve.run(app_builder(args), name="cabochon")
finally:
    print(serve.status().applications["cabochon"].deployments["cabochon"].message)  # as `serve status` has it
"""


class TwoNodes:
    """A head without a CPU, and a node for one replica. Everything has ended with the context."""

    def __init__(self, **node_environment: str) -> None:
        """node_environment: what is other than ENVIRONMENT on the node of the replica."""
        self._node_environment = node_environment

    def __enter__(self) -> "TwoNodes":
        self._env = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "CABOCHON_"))}
        self._env |= ENVIRONMENT | {"RAY_ADDRESS": f"127.0.0.1:{GCS_PORT}"}
        self._folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path, for sockets' names
        self._env["RAY_TMPDIR"] = self._folder
        self._log = open(Path(self._folder) / "log", "w+")  # as long as the context
        head = ["--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false"]
        self._head = self._start(self._env, *head)
        wait_until(lambda: "Ray runtime started" in self.output(), 60)
        node_env = self._env | self._node_environment
        self.node = self._start(node_env, f"--address=127.0.0.1:{GCS_PORT}", "--num-cpus=1")
        wait_until(lambda: self.output().count("Ray runtime started") == 2, 60)
        return self

    def __exit__(self, *_: object) -> None:
        processes = [self.node, self._head]
        for process in list(processes):
            with suppress(psutil.NoSuchProcess):
                processes += process.children(recursive=True)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 10)
        self._log.close()
        subprocess.run(["rm", "-rf", self._folder], check=True)

    def deploy(self, host: str, args: str) -> subprocess.CompletedProcess[str]:
        """Returns when the replica is ready, or will not be."""
        command = [sys.executable, "-c", DEPLOY % PROXY_PORT, host, args]
        return subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=100)

    def output(self) -> str:
        return (Path(self._folder) / "log").read_text(errors="replace")

    def serve(self, *command: str) -> psutil.Popen:
        """Ray's own program; it ends by SIGINT, also if this process was started without."""
        return psutil.Popen(
            [str(RAY.with_name("serve")), *command],
            env=self._env, stdout=self._log, stderr=self._log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def _start(self, env: dict[str, str], *flags: str) -> psutil.Popen:
        return psutil.Popen([*START, *flags], env=env, stdout=self._log, stderr=self._log)


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    with TwoNodes() as nodes:
        yield nodes


def test_sigterm_to_a_node_drains_its_replica_in_three_phases(
    two_nodes: TwoNodes, endless_gemma2_dir: Path
) -> None:
    args = {
        "model": str(endless_gemma2_dir),
        "dtype": "fp32",
        "kv_cache_gib": 0.1,
        "threads": 1,
        "num_cpus": 0.1,
    }
    args |= {"port": PORT, "lame_duck_s": LAME_DUCK_S, "drain_timeout_s": DRAIN_S}
    run = two_nodes.deploy("0.0.0.0", json.dumps(args))
    assert run.returncode == 0, run.stderr[-2000:]
    one = {"prompt": "a", "max_tokens": 1}
    with Replica(0) as replica:
        endless = Stream(replica.url, 60_000)
        wait_until(lambda: endless.events, 20)
        two_nodes.node.send_signal(signal.SIGTERM)
        wait_until(lambda: replica.health() == 503, 10)
        seen_s = time.monotonic()
        assert replica.http.post("/v1/completions", json=one).status_code == 200, "lame duck"
        wait_until(lambda: replica.http.post("/v1/completions", json=one).status_code == 503, 10)
        assert time.monotonic() - seen_s > LAME_DUCK_S / 2
        assert endless.is_alive()
        endless.join(DRAIN_S + 10)
        assert endless.error_code == "engine_dead", "the deadline's error, not a cut"
    two_nodes.node.wait(30)


def test_serve_run_is_one_command_and_ends_by_control_c(two_nodes: TwoNodes, long_gemma2_dir: Path) -> None:
    start = two_nodes.serve("start", f"--http-port={PROXY_PORT}", "--http-host=0.0.0.0")
    assert start.wait(60) == 0, two_nodes.output()[-2000:]
    args = {"model": long_gemma2_dir, "dtype": "fp32", "kv_cache_gib": 0.1, "threads": 1, "num_cpus": 0.1}
    args |= {"port": PORT, "lame_duck_s": 0}
    run = two_nodes.serve(
        "run", "cabochon.server.deployment:app_builder", *(f"{k}={v}" for k, v in args.items())
    )
    with Replica(0) as replica:
        wait_until(lambda: replica.health() == 200 or run.poll() is not None, 90)
        assert run.poll() is None, two_nodes.output()[-2000:]
        answer = replica.http.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 3, "ignore_eos": True}
        )
        assert answer.json()["usage"]["completion_tokens"] == 3
        wait_until(lambda: "is ready at" in two_nodes.output(), 30)
        run.send_signal(signal.SIGINT)
        run.wait(60)
        wait_until(lambda: replica.health() == 0, 30)


def test_a_node_that_is_set_up_otherwise_is_named_in_the_status_with_the_mend() -> None:
    with TwoNodes(RAY_SERVE_ENABLE_DIRECT_INGRESS="0") as nodes:
        run = nodes.deploy("0.0.0.0", json.dumps({"model": "/nonexistent", "port": PORT, "num_cpus": 0.1}))
    assert run.returncode != 0
    mend = "it is 0: set it in the environment of every Ray node, head and workers, and start Ray again"
    assert (
        f"RAY_SERVE_ENABLE_DIRECT_INGRESS must be 1 (a port of its own for each replica), {mend}"
        in run.stdout
    )
