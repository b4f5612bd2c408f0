"""overlays/local-cpu runs: KubeRay's `ray start` lines in two networks, with the manifest's ports and config.

Not of the manifest: the images, whose place this machine's packages take, and the folders of volumes.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay import HEAD_IP, WORKER_IP, PodNetwork, amount, ray_start
from kustomized import environment_of, head_of, one, rendered, worker_of
from tools import need_program

DOCUMENTS_OF = "overlays/local-cpu"
GCS = f"{HEAD_IP}:6379"
START_S = 150


def lines() -> dict[str, str]:
    """`ray start` of head and worker."""
    config = one(rendered(DOCUMENTS_OF), "RayService")["spec"]["rayClusterConfig"]
    (group,) = config["workerGroupSpecs"]

    def line(spec: Any, head_address: str | None) -> str:
        (container,) = spec["template"]["spec"]["containers"]
        return ray_start(spec["rayStartParams"], container["resources"]["limits"], head_address)

    return {"head": line(config["headGroupSpec"], None), "worker": line(group, GCS)}


def test_quantities_are_read_as_kubernetes_does() -> None:
    assert [amount(text) for text in ("2", "500m", "1500m", "22Gi", "512Mi")] == [2, 1, 2, 22 * 2**30, 2**29]


def test_the_start_lines_are_kuberays() -> None:
    assert lines() == {
        "head": "ray start --head --block --dashboard-agent-listen-port=52365 --dashboard-host=0.0.0.0"
        " --memory=2147483648 --metrics-export-port=8080 --num-cpus=0 --object-store-memory=200000000",
        "worker": "ray start --address=10.77.0.1:6379 --block --dashboard-agent-listen-port=52365"
        " --memory=4294967296 --metrics-export-port=8080 --num-cpus=2 --object-store-memory=200000000",
    }


def test_a_gpu_is_one_of_rays() -> None:
    assert "--num-gpus=1" in ray_start({}, {"cpu": "6", "memory": "22Gi", "nvidia.com/gpu": "1"}, GCS)


@pytest.fixture(scope="module")
def pods(demo_dir: Path) -> Iterator[PodNetwork]:
    """Head and worker with the application, and a worker that is ready as kubelet would see it."""
    documents = rendered(DOCUMENTS_OF)
    need_program("curl")
    with PodNetwork() as pods:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CABOCHON_"))
        }
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for pod, role, template in (
            (pods.head, "head", head_of(documents)),
            (pods.worker, "worker", worker_of(documents)),
        ):
            told = environment_of(documents, template)
            assert told["CABOCHON_CACHE_DIR"].startswith("/cache/")
            told = {name: value.replace("/cache", str(pods.folder)) for name, value in told.items()}
            told |= {"CABOCHON_CACHE_DIR": str(demo_dir.parent)}  # converted already
            env = {**kept, "PATH": path, "RAY_TMPDIR": str(pods.folder), "RAY_AUTH_MODE": "disabled", **told}
            pods.start(pod, f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {lines()[role]}", env)
        serve = yaml.safe_load(one(documents, "RayService")["spec"]["serveConfigV2"])
        dashboard = f"http://{HEAD_IP}:8265/api"
        # As KubeRay does: health of both nodes, then the Serve config to the dashboard
        ready = head_of(documents)["spec"]["containers"][0]["readinessProbe"]["httpGet"]
        wait_for_200(pods, pods.head, f"http://{HEAD_IP}:{ready['port']}{ready['path']}")
        alive = worker_of(documents)["spec"]["containers"][0]["livenessProbe"]["httpGet"]
        wait_for_200(pods, pods.worker, f"http://{WORKER_IP}:{alive['port']}{alive['path']}")
        put = ["--request", "PUT", "--header", "Content-Type: application/json", "--data", json.dumps(serve)]
        wait_for_200(pods, pods.head, f"{dashboard}/serve/applications/", *put)
        ready = worker_of(documents)["spec"]["containers"][0]["readinessProbe"]["httpGet"]
        wait_for_200(pods, pods.worker, f"http://{WORKER_IP}:{ready['port']}{ready['path']}")
        yield pods


def wait_for_200(pods: PodNetwork, pod: str, url: str, *curl: str) -> None:
    deadline = time.monotonic() + START_S
    while not pods.ask(pod, url, *curl).startswith("HTTP/1.1 200"):
        assert time.monotonic() < deadline, f"{url}\n{pods.log[-3000:]}"
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/health", "/-/healthz", "/metrics", "/v1/models"])
def test_the_worker_answers_from_another_pod(pods: PodNetwork, path: str) -> None:
    answer = pods.ask(pods.head, f"http://{WORKER_IP}:8000{path}")
    assert answer.startswith("HTTP/1.1 200"), answer


@pytest.mark.slow
def test_it_serves_a_chat(pods: PodNetwork) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    post = ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    answer = pods.ask(pods.head, f"http://{WORKER_IP}:8000/v1/chat/completions", *post)
    assert answer.startswith("HTTP/1.1 200"), answer
    assert json.loads(answer.split("\n\n")[-1])["usage"]["completion_tokens"] >= 1


@pytest.mark.slow
def test_the_head_has_no_replica_and_its_proxy_is_elsewhere(pods: PodNetwork) -> None:
    assert pods.ask(pods.worker, f"http://{HEAD_IP}:8000/health") == ""
    assert pods.ask(pods.worker, f"http://{HEAD_IP}:8100/-/healthz").startswith("HTTP/1.1 200")


@pytest.mark.slow
def test_ray_is_the_first_process_of_its_pod(pods: PodNetwork) -> None:
    """kubelet's SIGTERM must reach it, not a shell: bash runs the last command of a line in its own place."""
    for process in pods.first_processes:
        assert process.cmdline()[1:3] == [str(Path(sys.executable).with_name("ray")), "start"]
