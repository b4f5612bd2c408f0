"""What KubeRay makes of a RayCluster's pods, for a machine without it: `ray start` and the environment.

Rules: ray-project/kuberay at feeaf72, ray-operator/controllers/ray/common/pod.go: setMissingRayStartParams,
generateRayStartCommand, convertParamMap.
"""

import math
from decimal import Decimal
from typing import Any

GCS_PORT, METRICS_PORT, AGENT_PORT = "6379", "8080", "52365"  # utils/constant.go
KEEP_BOOLEANS = ("log-color", "include-dashboard", "include-log-monitor")
SUFFIXES = {"m": "0.001", "k": "1e3", "M": "1e6", "G": "1e9", "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def ray_start(group: dict[str, Any], *, head_host: str | None) -> list[str]:
    """Arguments of `ray` for a pod of the group. head_host: the head's address, None for the head itself."""
    container = group["template"]["spec"]["containers"][0]
    params = dict(group.get("rayStartParams", {}))
    if head_host is None:
        params.setdefault("dashboard-host", "0.0.0.0")
    else:
        params.setdefault("address", f"{head_host}:{GCS_PORT}")
    params.setdefault("metrics-export-port", METRICS_PORT)
    params["block"] = "true"
    params.setdefault("dashboard-agent-listen-port", AGENT_PORT)
    limits, requests = (container["resources"].get(kind, {}) for kind in ("limits", "requests"))
    for name, values in (("cpu", {**requests, **limits}), ("memory", limits)):
        option = {"cpu": "num-cpus", "memory": "memory"}[name]
        if quantity(values.get(name, "0")):
            params.setdefault(option, str(quantity(values[name])))
    for name in sorted(limits):
        if name.endswith("gpu") and quantity(limits[name]):
            params.setdefault("num-gpus", str(quantity(limits[name])))
    head = ["--head"] if head_host is None else []
    return ["start", *head, *(flag for name in sorted(params) if (flag := _flag(name, params[name])))]


def _flag(name: str, value: str) -> str:
    """A switch if the value is a boolean, and nothing if it is false."""
    if value.lower() in ("true", "false") and name not in KEEP_BOOLEANS:
        return f"--{name}" if value.lower() == "true" else ""
    return f"--{name}={value}"


def quantity(text: str) -> int:
    """Kubernetes' number, rounded up as Quantity.Value does."""
    number = text.rstrip("kmMGi")
    return math.ceil(Decimal(number) * Decimal(SUFFIXES.get(text[len(number) :], 1)))


def environment(group: dict[str, Any], config_maps: dict[str, dict[str, str]]) -> dict[str, str]:
    """Of the pod's container: envFrom in order, then env."""
    container = group["template"]["spec"]["containers"][0]
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= config_maps[source["configMapRef"]["name"]]
    return found | {one["name"]: one["value"] for one in container.get("env", ())}
