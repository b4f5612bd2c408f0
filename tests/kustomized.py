"""deploy/gke as `kubectl kustomize` renders it, once a session; and the ways into what it renders."""

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from tools import absent, need_program

ROOT = Path(__file__).parents[1]
GKE = ROOT / "deploy" / "gke"
OVERLAYS = sorted(path.name for path in (GKE / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (GKE / "components").iterdir())
SITES = sorted(path.name for path in (GKE / "sites").iterdir())
GPU_OVERLAYS = [name for name in OVERLAYS if name != "local-cpu"]
Document = dict[str, Any]


@functools.cache
def rendered(folder: str, *components: str) -> tuple[Document, ...]:
    """folder: below deploy/gke, such as overlays/local-cpu. components: added in order, as a site does."""
    path = GKE / folder
    if not components:
        return _render(path)
    with tempfile.TemporaryDirectory() as folder_name:
        site = Path(folder_name).resolve()
        kustomization = {  # absolute paths are not allowed
            "resources": [os.path.relpath(path, site)],
            "components": [os.path.relpath(GKE / "components" / name, site) for name in components],
        }
        (site / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return _render(site)


def _render(path: Path) -> tuple[Document, ...]:
    kubectl = need_program("kubectl", str(Path(sys.executable).with_name("kubectl")))
    run = subprocess.run([kubectl, "kustomize", str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tuple(yaml.load_all(run.stdout, yaml.CSafeLoader))


@functools.cache
def crdcheck() -> tuple[ModuleType, dict[Any, Any]]:
    """The strict checker, and the schemas of all CRDs that it knows."""
    folder = Path(os.environ.get("CABOCHON_CRDS", ROOT.parent / "shared" / "crds"))
    if not (folder / "crdcheck.py").exists():
        absent(f"there are no CRD schemas in {folder}: set CABOCHON_CRDS")
    spec = importlib.util.spec_from_file_location("crdcheck", folder / "crdcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.load_schemas(folder)


def of_kind(documents: tuple[Document, ...], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def one(documents: tuple[Document, ...], kind: str, name: str = "cabochon") -> Document:
    (found,) = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    return found


def head_of(documents: tuple[Document, ...]) -> Document:
    """The pod template of the head."""
    template: Document = one(documents, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    return template


def worker_of(documents: tuple[Document, ...]) -> Document:
    """The pod template of the only worker group."""
    (group,) = one(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    template: Document = group["template"]
    return template


def environment_of(documents: tuple[Document, ...], template: Document) -> dict[str, str]:
    """What the Ray container of a pod finds set; of a secret, its name and key."""
    container = template["spec"]["containers"][0]
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        found |= one(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container["env"]:
        secret = variable.get("valueFrom", {}).get("secretKeyRef", {})
        found[variable["name"]] = variable.get("value", f"{secret.get('name')}/{secret.get('key')}")
    return found


def pods_of(documents: tuple[Document, ...]) -> Iterator[tuple[str, Document]]:
    """Name and pod template of all that runs, with the labels that KubeRay adds."""
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield document["metadata"]["name"], document["spec"]["template"]
    for kind, template in (("head", head_of(documents)), ("worker", worker_of(documents))):
        yield f"ray {kind}", {"metadata": {"labels": labels_of(template, kind)}, "spec": template["spec"]}


def labels_of(template: Document, node_type: str) -> dict[str, str]:
    """KubeRay's labels and ours (ray-operator/controllers/ray/common/pod.go, labelPod)."""
    kuberay = {
        "ray.io/node-type": node_type,
        "ray.io/is-ray-node": "yes",
        "ray.io/serve": str(node_type == "worker").lower(),
        "app.kubernetes.io/name": "kuberay",
    }
    return kuberay | template.get("metadata", {}).get("labels", {})


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector means a pod with these labels."""
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )
