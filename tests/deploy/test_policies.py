"""What a security review and a load balancer would ask of the manifests, against the code that they start."""

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from fake_server import fake_service
from fastapi.routing import APIRoute
from kustomized import (
    GKE,
    GPU_OVERLAYS,
    OVERLAYS,
    ROOT,
    SITES,
    Document,
    environment_of,
    head_of,
    labels_of,
    matches,
    of_kind,
    one,
    pods_of,
    rendered,
    worker_of,
)
from ray._private import ray_constants
from ray.dashboard.modules.reporter import healthz_agent

from cabochon.engine.errors import ConfigError
from cabochon.server.app import build_app
from cabochon.server.deployment import END_S
from cabochon.server.gateway.scheduling import Weights
from cabochon.server.settings import load_arguments

FULL = ("overlays/gemma2-9b-h100", "weights-gcs-fuse", "model-armor", "adapters", "api-keys")
RENDERED = [*((f"overlays/{name}",) for name in OVERLAYS), *((f"sites/{name}",) for name in SITES), FULL]
every_rendering = pytest.mark.parametrize("parts", RENDERED, ids="+".join)


def containers_of(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


@every_rendering
def test_nothing_runs_as_root_or_can_become_it(parts: tuple[str, ...]) -> None:
    """Kubernetes' restricted standard, which the namespace enforces, and a read-only file system."""
    documents = rendered(*parts)
    (namespace,) = of_kind(documents, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    options = one(documents, "RayService")["spec"]["rayClusterConfig"].get("autoscalerOptions")
    for name, pod in pods_of(documents):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys(), name
        assert not any("hostPath" in volume for volume in pod["spec"].get("volumes", [])), name
        for container in containers_of(pod) + ([options] if options else []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }, name


@every_rendering
def test_every_container_says_what_it_takes(parts: tuple[str, ...]) -> None:
    """A ResourceQuota refuses pods that do not."""
    documents = rendered(*parts)
    options = one(documents, "RayService")["spec"]["rayClusterConfig"].get("autoscalerOptions")
    for name, pod in pods_of(documents):
        for container in containers_of(pod) + ([options] if options else []):
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][kind].keys(), name


@every_rendering
def test_images_have_a_version(parts: tuple[str, ...]) -> None:
    for name, pod in pods_of(rendered(*parts)):
        for container in containers_of(pod):
            image, _, tag = container["image"].rpartition("/")[2].partition(":")
            is_ours = image.startswith("cabochon-")
            assert tag != "latest", name
            assert tag or is_ours, name  # ours: a site says which
    for site in SITES:
        for template in (head_of(rendered(f"sites/{site}")), worker_of(rendered(f"sites/{site}"))):
            for container in containers_of(template):
                assert container["image"] == "LOCATION-docker.pkg.dev/PROJECT/cabochon/cabochon-gpu:TAG"


def mounts_of(template: Document) -> dict[str, bool]:
    """Paths in the Ray container, and whether they are read-only."""
    mounts = template["spec"]["containers"][0]["volumeMounts"]
    return {mount["mountPath"]: mount.get("readOnly", False) for mount in mounts}


def mount_of(path: str, mounts: dict[str, bool]) -> str | None:
    parents = [str(parent) for parent in (PurePosixPath(path), *PurePosixPath(path).parents)]
    return next((parent for parent in parents if parent in mounts), None)


@every_rendering
def test_what_is_written_goes_to_a_volume(parts: tuple[str, ...]) -> None:
    documents = rendered(*parts)
    for template in (head_of(documents), worker_of(documents)):
        mounts = mounts_of(template)
        environment = environment_of(documents, template)
        names = ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "CABOCHON_CACHE_DIR")
        paths = [environment[name] for name in names if name in environment]
        for path in [*paths, "/tmp/ray", "/dev/shm"]:
            assert mounts[mount_of(path, mounts) or ""] is False, path
        (shm,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("weights", ["weights-gcs-fuse", "weights-hyperdisk-ml"])
def test_what_options_name_is_mounted_read_only(weights: str) -> None:
    documents = rendered("overlays/gemma2-9b-h100", weights, "adapters", "api-keys")
    mounts = mounts_of(worker_of(documents))
    environment = environment_of(documents, worker_of(documents))
    for name in ("CABOCHON_MODEL", "CABOCHON_LORA_DIR", "CABOCHON_API_KEY_FILE"):
        assert mounts[mount_of(environment[name], mounts) or ""] is True, name


def test_from_the_hub_the_model_is_an_id_and_the_token_a_secret() -> None:
    documents = rendered("overlays/gemma2-9b-h100", "weights-hub")
    environment = environment_of(documents, worker_of(documents))
    assert environment["CABOCHON_MODEL"] == "google/gemma-2-9b-it"
    assert environment["HF_TOKEN"] == "huggingface/token"
    assert "HF_TOKEN" not in environment_of(documents, head_of(documents))


@pytest.fixture(scope="module")
def routes() -> set[str]:
    return {route.path for route in build_app(fake_service()).routes if isinstance(route, APIRoute)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_paths_and_ports_that_exist(overlay: str, routes: set[str]) -> None:
    documents = rendered(f"overlays/{overlay}")
    head, worker = (
        template["spec"]["containers"][0] for template in (head_of(documents), worker_of(documents))
    )
    ready = worker["readinessProbe"]["httpGet"]
    assert ready["path"] in routes
    assert [ready["port"]] == [port["containerPort"] for port in worker["ports"] if port["name"] == "serve"]
    for container in (head, worker):
        alive = container["livenessProbe"]["httpGet"]
        assert f'"{alive["path"]}"' in inspect.getsource(healthz_agent)
        assert alive["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    ready = head["readinessProbe"]["httpGet"]
    reporter = import_module("ray.dashboard.modules.reporter.reporter_head")
    assert f'"{ready["path"]}"' in inspect.getsource(reporter)
    assert ready["port"] == ray_constants.DEFAULT_DASHBOARD_PORT


def test_load_balancer_and_collector_ask_paths_that_exist(routes: set[str]) -> None:
    documents = rendered("overlays/gemma2-9b-l4")
    port = one(documents, "InferencePool")["spec"]["targetPorts"][0]["number"]
    check = one(documents, "HealthCheckPolicy")["spec"]["default"]["config"]["httpHealthCheck"]
    assert check["requestPath"] in routes
    (scrape,) = one(documents, "PodMonitoring")["spec"]["endpoints"]
    assert scrape["path"] in routes
    assert check["port"] == scrape["port"] == port


def test_the_gateway_shows_the_api_and_nothing_of_the_operators(routes: set[str]) -> None:
    (rule,) = one(rendered("overlays/gemma2-9b-l4"), "HTTPRoute")["spec"]["rules"]
    shown = {(match["path"]["type"], match["path"]["value"]) for match in rule["matches"]}
    assert {path for _, path in shown} <= routes
    prefixes = [path for kind, path in shown if kind == "PathPrefix"]
    hidden = {"/metrics", "/health", "/docs", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    assert hidden < routes
    for path in hidden:
        assert ("Exact", path) not in shown
        assert not any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_the_pool_is_the_workers_and_nobody_else(overlay: str) -> None:
    documents = rendered(f"overlays/{overlay}")
    for kind in ("InferencePool", "PodDisruptionBudget", "PodMonitoring"):
        selector = one(documents, kind)["spec"]["selector"]
        chosen = [name for name, pod in pods_of(documents) if matches(selector, pod["metadata"]["labels"])]
        assert chosen == ["ray worker"], kind
    template = worker_of(documents)
    assert template["metadata"]["labels"]["llm-d.ai/engine-type"] == "vllm"
    size, gpu = overlay.split("-")[1:3]
    assert template["metadata"]["labels"]["cabochon.dev/model"] == f"gemma2-{size}-it"
    assert gpu in template["spec"]["nodeSelector"]["cloud.google.com/gke-accelerator"]


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_a_pod_has_one_gpu_and_one_port(overlay: str) -> None:
    documents = rendered(f"overlays/{overlay}")
    (container,) = worker_of(documents)["spec"]["containers"]
    assert {container["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {"1"}
    (port,) = container["ports"]
    pool = one(documents, "InferencePool")["spec"]
    assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    assert pool["selector"]["matchLabels"].items() <= labels_of(worker_of(documents), "worker").items()


def test_the_pool_finds_its_picker() -> None:
    documents = rendered("overlays/gemma2-9b-l4")
    reference = one(documents, "InferencePool")["spec"]["endpointPickerRef"]
    service = one(documents, "Service", reference["name"])["spec"]
    assert reference["port"]["number"] in [port["port"] for port in service["ports"]]
    (found,) = [
        pod
        for _, pod in pods_of(documents)
        if matches({"matchLabels": service["selector"]}, pod["metadata"]["labels"])
    ]
    (container,) = found["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["grpc"] == reference["port"]["number"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == ports["grpc-health"]
    arguments = dict(argument.removeprefix("--").split("=") for argument in container["args"])
    assert arguments["pool-name"] == one(documents, "InferencePool")["metadata"]["name"]
    assert arguments["pool-namespace"] == one(documents, "InferencePool")["metadata"]["namespace"]
    assert int(arguments["grpc-health-port"]) == ports["grpc-health"]
    folder, name = arguments["config-file"].rsplit("/", 1)
    assert folder in [mount["mountPath"] for mount in container["volumeMounts"]]
    (volume,) = found["spec"]["volumes"]
    assert name in one(documents, "ConfigMap", volume["configMap"]["name"])["data"]
    verbs = {
        rule["resources"][0]: rule["verbs"] for rule in one(documents, "Role", "cabochon-picker")["rules"]
    }
    assert set(verbs) == {"pods", "inferencepools", "inferenceobjectives"}
    assert all(allowed == ["get", "list", "watch"] for allowed in verbs.values())


def picker_config(*parts: str) -> Any:
    (config,) = [d for d in of_kind(rendered(*parts), "ConfigMap") if "picker-config.yaml" in d["data"]]
    return yaml.safe_load(config["data"]["picker-config.yaml"])


@pytest.mark.parametrize("components", [(), ("adapters",)])
def test_the_pickers_weights_are_those_that_we_test(components: tuple[str, ...]) -> None:
    config = picker_config("overlays/gemma2-9b-l4", *components)
    (profile,) = config["schedulingProfiles"]
    weights = {plugin["pluginRef"]: plugin["weight"] for plugin in profile["plugins"]}
    assert set(weights) == {plugin["type"] for plugin in config["plugins"]}
    ours = Weights()
    expected = {
        "queue-scorer": ours.queue,
        "kv-cache-utilization-scorer": ours.kv,
        "prefix-cache-scorer": ours.prefix,
    }
    assert weights == expected | ({"lora-affinity-scorer": 3} if components else {})


def test_the_charts_values_say_the_same_as_the_manifests() -> None:
    values = yaml.safe_load((GKE / "picker-values.yaml").read_text())
    documents = rendered("overlays/gemma2-9b-l4")
    pool = one(documents, "InferencePool")["spec"]
    servers, epp = values["router"]["modelServers"], values["router"]["epp"]
    assert servers["matchLabels"] == pool["selector"]["matchLabels"]
    assert servers["targetPorts"] == pool["targetPorts"]
    assert values["router"]["inferencePool"]["failureMode"] == pool["endpointPickerRef"]["failureMode"]
    (container,) = one(documents, "Deployment", "cabochon-picker")["spec"]["template"]["spec"]["containers"]
    image = epp["image"]
    assert f"{image['registry']}/{image['repository']}:{image['tag']}" == container["image"]
    assert epp["resources"] == container["resources"]
    custom = yaml.safe_load(epp["pluginsCustomConfig"][epp["pluginsConfigFile"]])
    assert custom == picker_config("overlays/gemma2-9b-l4")


@every_rendering
def test_the_end_of_a_pod_leaves_time_for_lame_duck_and_drain(parts: tuple[str, ...]) -> None:
    documents = rendered(*parts)
    head, worker = head_of(documents), worker_of(documents)
    environment = environment_of(documents, worker)
    lame_duck_s = float(environment["CABOCHON_LAME_DUCK_S"])
    drain_s = float(environment["CABOCHON_DRAIN_TIMEOUT_S"])
    ray_drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert float(environment["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"]) >= lame_duck_s
    assert ray_drain_s > lame_duck_s + drain_s + END_S

    def pre_stop_s(template: Document) -> int:
        seconds: int = template["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        return seconds

    grace_s = worker["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= pre_stop_s(worker) + ray_drain_s + 20
    assert pre_stop_s(head) > grace_s  # a worker drains through the head
    assert head["spec"]["terminationGracePeriodSeconds"] > pre_stop_s(head)
    assert float(environment_of(documents, head)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) == 0
    probe = worker["spec"]["containers"][0]["readinessProbe"]
    assert lame_duck_s > probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    if of_kind(documents, "GCPBackendPolicy"):
        policy = one(documents, "GCPBackendPolicy")["spec"]["default"]
        assert policy["timeoutSec"] <= drain_s  # no stream is longer than a drain
        assert policy["connectionDraining"]["drainingTimeoutSec"] >= lame_duck_s + drain_s
        check = one(documents, "HealthCheckPolicy")["spec"]["default"]
        assert lame_duck_s > 5 * (check["checkIntervalSec"] + check["timeoutSec"])
        picker = one(documents, "Deployment", "cabochon-picker")["spec"]["template"]["spec"]
        assert picker["terminationGracePeriodSeconds"] > policy["timeoutSec"]


def test_rays_environment_passes_our_check_and_is_that_of_the_guide() -> None:
    documents = rendered("overlays/gemma2-9b-l4")
    code = (
        "import os, json\n"
        "from cabochon.server.ingress import check_direct_ingress\n"
        "from cabochon.server.settings import load_arguments, set_ray_environment\n"
        "settings = load_arguments({})\n"
        "check_direct_ingress(settings)\n"
        "before = dict(os.environ)\n"
        "set_ray_environment(settings)\n"
        "print(json.dumps([name for name in os.environ.keys() - before.keys() if name.startswith('RAY_')]))"
    )
    text = (ROOT / "docs/ray-serve.md").read_text().split("```yaml\n")[1].split("```")[0]
    guide = {variable["name"] for variable in yaml.safe_load(text)["env"]}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CABOCHON_"))}
    environment = environment_of(documents, worker_of(documents))
    assert {name for name in environment if name.startswith("RAY_")} == guide
    command, env = [sys.executable, "-c", code], {**environment, **kept}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [], "a variable is missing"


@every_rendering
def test_ray_is_told_the_same_on_every_node(parts: tuple[str, ...]) -> None:
    """But that the head has nothing to drain."""
    documents, usual = rendered(*parts), rendered("overlays/gemma2-9b-l4")
    (expected,) = [d["data"] for d in of_kind(usual, "ConfigMap") if d["metadata"]["name"].startswith("ray-")]
    for template, change in (
        (worker_of(documents), {}),
        (head_of(documents), {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}),
    ):
        told = environment_of(documents, template)
        assert {name: told[name] for name in expected} == {**expected, **change}


@every_rendering
def test_kubernetes_adds_no_variables_for_services(parts: tuple[str, ...]) -> None:
    """CABOCHON_PICKER_SERVICE_HOST, for one, is no option of ours."""
    for name, pod in pods_of(rendered(*parts)):
        assert pod["spec"]["enableServiceLinks"] is False, name


def test_such_a_variable_would_stop_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_PICKER_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match="CABOCHON_PICKER_SERVICE_HOST is not an option"):
        load_arguments({})


def test_the_proxy_is_out_of_the_way() -> None:
    """The proxy is off the replicas' port, and the Service that KubeRay makes for it is nobody's path."""
    documents = rendered("overlays/gemma2-9b-l4")
    config = yaml.safe_load(one(documents, "RayService")["spec"]["serveConfigV2"])
    ports = {
        port["name"]: port["containerPort"] for port in head_of(documents)["spec"]["containers"][0]["ports"]
    }
    assert ports["serve"] == config["http_options"]["port"] != 8000
    assert ports["dashboard"] == ray_constants.DEFAULT_DASHBOARD_PORT
    assert ports["gcs-server"] == ray_constants.DEFAULT_PORT
    assert one(documents, "RayService")["spec"]["excludeHeadPodFromServeSvc"] is True
    assert one(documents, "RayService")["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


@pytest.mark.parametrize(
    "name", ["compute-class-spot", "compute-class-flex-start", "compute-class-reservation"]
)
@pytest.mark.parametrize("overlay", ["gemma2-2b-l4", "gemma2-27b-a100"])
def test_a_compute_class_has_the_gpu_of_its_overlay(name: str, overlay: str) -> None:
    documents = rendered(f"overlays/{overlay}", name)
    (compute_class,) = of_kind(documents, "ComputeClass")
    selector = worker_of(documents)["spec"]["nodeSelector"]
    assert selector["cloud.google.com/compute-class"] == compute_class["metadata"]["name"]
    for priority in compute_class["spec"]["priorities"]:
        assert priority["gpu"]["type"] == selector["cloud.google.com/gke-accelerator"]
        assert priority["gpu"]["count"] == 1


def test_the_import_path_leads_to_what_is_there() -> None:
    path = environment_of(rendered("overlays/local-cpu"), worker_of(rendered("overlays/local-cpu")))
    module, _, name = path["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    assert callable(getattr(import_module(module), name))


def test_the_files_of_options_are_read_whole() -> None:
    """`=` and a comment in one line would make the comment part of the value."""
    for path in (GKE / "base/server").glob("*.env"):
        for line in Path(path).read_text().splitlines():
            assert line.startswith("#") or " " not in line, line
