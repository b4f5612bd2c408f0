"""The guide and its pages: what they name exists, and what can be run without a cloud runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kustomized import (
    COMPONENTS,
    GKE,
    OVERLAYS,
    ROOT,
    environment_of,
    head_of,
    pods_of,
    rendered,
    worker_of,
)
from tools import need_program

from cabochon.server.cli import USAGE
from cabochon.server.settings import as_arguments, load_arguments

PAGES = sorted(GKE.glob("*.md"))
GUIDE = (GKE / "README.md").read_text()
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FOLDERS = (
    "base",
    "cluster",
    "components",
    "observability",
    "overlays",
    "sites",
    "tests",
    "docs",
    "server",
    "deploy",
)


def blocks_of(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


@every_page
def test_paths_lead_to_what_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(rf"`(?:\.\./)*((?:{'|'.join(FOLDERS)})/[\w/.-]*)`", text):
        is_made = path.startswith("sites/mine")
        assert is_made or (GKE / path).exists() or (ROOT / path).exists(), path


@every_page
def test_commands_are_commands(page: Path) -> None:
    text = page.read_text()
    for block in blocks_of(text, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, capture_output=True)
    commands = "\n".join(blocks_of(text, "bash") + re.findall(r"`([^`\n]+)`", text))
    for path in re.findall(r"deploy/gke/[\w./-]+", commands):
        is_made = path.startswith("deploy/gke/sites/mine") or path == "deploy/gke/cluster/config.env"
        assert is_made or (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
    known = set(re.findall(r"^  ([a-z-]+) ", USAGE, re.MULTILINE))
    assert set(re.findall(r"(?:^|`)cabochon ([a-z-]+)", commands, re.MULTILINE)) <= known


@every_page
def test_options_are_options(page: Path) -> None:
    named = re.findall(r"\bCABOCHON_([A-Z_]*[A-Z])(?:=([^\s,\]`]+))?", page.read_text())
    assert {name.lower() for name, _ in named} <= as_arguments(load_arguments({})).keys()
    load_arguments({name.lower(): value for name, value in named if value})


@every_page
def test_numbers_are_those_of_the_manifests(page: Path) -> None:
    text = page.read_text()
    documents = rendered("overlays/gemma2-9b-l4")
    for name, value in re.findall(r"`?(\w+)`? \((\d+)\)", text) + [
        (name, value) for value, name in re.findall(r"(\d+) s \(`(\w+)`\)", text)
    ]:
        assert f"'{name}': {value}" in str(documents), name


def test_the_guide_names_every_overlay_and_every_component() -> None:
    named = {
        name
        for row in re.findall(r"^\|(.*)\|$", GUIDE, re.MULTILINE)
        for name in re.findall(r"`([\w-]+)`", row)
    }
    assert set(OVERLAYS) | set(COMPONENTS) <= named


def test_every_secret_that_a_pod_needs_is_made_by_a_command() -> None:
    made = set(re.findall(r"create secret (?:generic|tls) ([\w-]+)", GUIDE))
    needed = {"cabochon-tls"}  # of the Gateway
    for weights in ("weights-gcs-fuse", "weights-hub"):
        text = str([pod for _, pod in pods_of(rendered("overlays/gemma2-9b-h100", weights, "api-keys"))])
        needed |= set(re.findall(r"'secretKeyRef': {[^}]*'name': '([\w-]+)'", text))
        needed |= set(re.findall(r"'secretName': '([\w-]+)'", text))
    assert needed == {"cabochon-tls", "redis", "huggingface", "cabochon-api-keys"} == made


def test_the_commands_for_a_site_make_one(tmp_path: Path) -> None:
    """Step 5 as written, with the example's configuration of the cluster."""
    shutil.copytree(GKE, tmp_path / "deploy" / "gke")
    (block,) = [block for block in blocks_of(GUIDE, "bash") if "sites/example" in block]
    script = "set -eu\nsource deploy/gke/cluster/config.example.env\nTAG=1a2b3c4\n" + block.replace(
        "| less", ""
    )
    kubectl = need_program("kubectl", str(Path(sys.executable).with_name("kubectl")))
    env = {**os.environ, "PATH": f"{Path(kubectl).parent}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    documents = tuple(yaml.safe_load_all(run.stdout))
    assert not re.findall(
        r"\b(?:LOCATION|PROJECT|TAG|BUCKET|MODEL)\b(?!_)", run.stdout.replace("$CABOCHON_MODEL", "")
    )
    for template in (head_of(documents), worker_of(documents)):
        image = template["spec"]["containers"][0]["image"]
        assert image == "us-central1-docker.pkg.dev/my-project/cabochon/cabochon-gpu:1a2b3c4"
    assert {"bucketName": "my-project-cabochon"}.items() <= next(
        volume["csi"]["volumeAttributes"].items()
        for volume in worker_of(documents)["spec"]["volumes"]
        if volume["name"] == "weights"
    )


def test_the_image_writes_where_volumes_are() -> None:
    dockerfile = (ROOT / "Dockerfile.gpu").read_text()
    template = worker_of(rendered("overlays/gemma2-9b-l4"))
    environment = environment_of(rendered("overlays/gemma2-9b-l4"), template)
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        assert re.findall(rf"\b{name}=(\S+)", dockerfile) == [environment[name]]
    user = template["spec"]["securityContext"]
    assert set(re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)) == {
        f"{user['runAsUser']}:{user['runAsGroup']}"
    }
