"""The overlay for kind and minikube runs: head and worker as KubeRay starts them, each in its own network."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fake_server import wait_until
from kuberay import environment, quantity, ray_start
from kustomized import of_kind, one, rendered
from tools import absent, need_program

OVERLAY = "overlays/local-cpu"
RAY = str(Path(sys.executable).with_name("ray"))
# A pod's root file system: read-only, but for a volume at /tmp. Then what KubeRay writes before `ray start`
READ_ONLY = "mount --bind /tmp /tmp && mount -o remount,bind,ro / && ! touch /written 2>/dev/null"
ULIMIT = "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}"
HEAD_IP, WORKER_IP = "10.213.77.1", "10.213.77.2"
ASK = """
import sys, urllib.request
method, url, body = sys.argv[1], sys.argv[2], sys.argv[3].encode() or None
request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
with urllib.request.urlopen(request, timeout=30) as answer:
    sys.stdout.write(answer.read().decode())
"""


def ray_service() -> dict[str, Any]:
    spec: dict[str, Any] = one(rendered(OVERLAY), "RayService")["spec"]
    return spec


def groups() -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the head, and of the only workers."""
    cluster = ray_service()["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def ports(group: dict[str, Any]) -> dict[str, int]:
    container = group["template"]["spec"]["containers"][0]
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def group(params: dict[str, str], **resources: dict[str, str]) -> dict[str, Any]:
    return {"rayStartParams": params, "template": {"spec": {"containers": [{"resources": resources}]}}}


def test_a_head_takes_its_parameters_before_its_resources() -> None:
    head = group({"num-cpus": "0", "no-monitor": "true"}, limits={"cpu": "2", "memory": "2Gi"})
    assert ray_start(head, head_host=None) == [
        "start", "--head", "--block", "--dashboard-agent-listen-port=52365", "--dashboard-host=0.0.0.0",
        "--memory=2147483648", "--metrics-export-port=8080", "--no-monitor", "--num-cpus=0",
    ]  # fmt: skip


def test_a_worker_has_the_head_s_address_and_its_limits() -> None:
    limits = {"cpu": "1500m", "memory": "22Gi", "nvidia.com/gpu": "1"}
    worker = group({"log-color": "false", "verbose": "false"}, limits=limits, requests={"cpu": "1"})
    assert ray_start(worker, head_host="head-svc") == [
        "start", "--address=head-svc:6379", "--block", "--dashboard-agent-listen-port=52365",
        "--log-color=false", "--memory=23622320128", "--metrics-export-port=8080", "--num-cpus=2",
        "--num-gpus=1",
    ]  # fmt: skip


def test_cpus_of_a_request_count_where_there_is_no_limit() -> None:
    worker = group({}, requests={"cpu": "3", "memory": "1Gi"})
    flags = ray_start(worker, head_host="h")
    assert "--num-cpus=3" in flags
    assert not any(flag.startswith("--memory") for flag in flags)


@pytest.mark.parametrize(("text", "value"), [("500m", 1), ("2", 2), ("1.5", 2), ("2Gi", 2**31), ("1k", 1000)])
def test_quantities_are_rounded_up(text: str, value: int) -> None:
    assert quantity(text) == value


class Nodes:
    """Two network namespaces joined by a wire, and a Ray node in each."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._names = [f"cabochon-{os.getpid()}-{kind}" for kind in ("head", "worker")]
        self._processes: list[psutil.Popen] = []

    def __enter__(self) -> "Nodes":
        ip = need_program("ip")
        head, worker = self._names
        first = subprocess.run([ip, "netns", "add", head], capture_output=True, text=True, check=False)
        if first.returncode:
            absent(f"no right to make a network namespace: {first.stderr.strip()}")
        wire = ["netns", head, "type", "veth", "peer", "name", "eth0", "netns", worker]
        run = [["netns", "add", worker], ["link", "add", "eth0", *wire]]
        for name, own, other in ((head, HEAD_IP, WORKER_IP), (worker, WORKER_IP, HEAD_IP)):
            run += [
                ["-n", name, "address", "add", f"{own}/24", "dev", "eth0"],
                ["-n", name, "link", "set", "eth0", "up"],
                ["-n", name, "link", "set", "lo", "up"],
                ["-n", name, "route", "add", "default", "via", other],  # by it Ray finds its own address
            ]
        try:
            for step in run:
                subprocess.run([ip, *step], check=True, capture_output=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        processes = list(self._processes)
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                processes += process.children(recursive=True)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 10)
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, number: int, arguments: list[str], env: dict[str, str]) -> None:
        """number: 0 is the head."""
        with open(self._log(number), "w") as log:
            line = f"{READ_ONLY} && {ULIMIT}; {shlex.join([RAY, *arguments])}"
            command = ["ip", "netns", "exec", self._names[number], "/bin/bash", "-c", "--", line]
            self._processes.append(psutil.Popen(command, env=env, stdout=log, stderr=log))
        wait_until(lambda: "Ray runtime started" in self.output(number), 60)

    def first_process(self, number: int) -> list[str]:
        """What gets kubelet's SIGTERM."""
        words: list[str] = self._processes[number].cmdline()
        return words

    def output(self, number: int) -> str:
        return self._log(number).read_text(errors="replace")

    def ask(self, number: int, method: str, url: str, body: str = "") -> str | None:
        """The answer to a request from that node's network, None if it failed."""
        command = ["ip", "netns", "exec", self._names[number], sys.executable, "-c", ASK, method, url, body]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
        return done.stdout if done.returncode == 0 else None

    def _log(self, number: int) -> Path:
        return Path(self._folder) / f"{number}.log"


def pod_environment(group: dict[str, Any], folder: str) -> dict[str, str]:
    """The pod's variables over this machine's; a volume of the pod's is a folder here."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(rendered(OVERLAY), "ConfigMap")}
    own = {
        name: value.replace("/cache", f"{folder}/cache") for name, value in environment(group, maps).items()
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CABOCHON_"))}
    own["CABOCHON_CACHE_DIR"] = str(Path.home() / ".cache" / "cabochon")  # the demo, converted once a machine
    return kept | own | {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="kr", dir="/tmp")  # a short path, for sockets' names
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (Path(folder) / "cache").mkdir()
        made = stack.enter_context(Nodes(folder))
        head, workers = groups()
        made.start(0, ray_start(head, head_host=None), pod_environment(head, folder))
        made.start(1, ray_start(workers, head_host=HEAD_IP), pod_environment(workers, folder))
        yield made


@pytest.mark.slow
def test_the_worker_answers_on_its_port(nodes: Nodes, demo_dir: Path) -> None:
    """The operator hands the application to the head's dashboard; who asks comes from another pod."""
    head, workers = groups()
    application = json.dumps(yaml.safe_load(ray_service()["serveConfigV2"]))
    dashboard = f"http://{HEAD_IP}:{ports(head)['dashboard']}/api/serve/applications/"
    worker = f"http://{WORKER_IP}:{ports(workers)['serve']}"
    wait_until(lambda: nodes.ask(1, "PUT", dashboard, application) is not None, 30)
    probe = workers["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
    assert probe["port"] == ports(workers)["serve"]
    deadline_s = time.monotonic() + 90
    while nodes.ask(0, "GET", worker + probe["path"]) is None:
        assert time.monotonic() < deadline_s, (nodes.ask(1, "GET", dashboard), nodes.output(1)[-2000:])
        time.sleep(0.5)
    body = json.dumps({"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0})
    answer = nodes.ask(0, "POST", f"{worker}/v1/completions", body)
    assert answer is not None
    assert json.loads(answer)["usage"]["completion_tokens"] == 3
    assert "vllm:cache_config_info" in (nodes.ask(0, "GET", f"{worker}/metrics") or "")
    assert nodes.ask(1, "GET", f"http://{HEAD_IP}:8000/health") is None, "no replica on the head"
    for number in (0, 1):  # bash runs the last command of a line in its own place
        assert nodes.first_process(number)[1:3] == [RAY, "start"]
