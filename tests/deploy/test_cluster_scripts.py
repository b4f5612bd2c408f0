"""The cluster scripts on a cloud that remembers (fake_gcloud), and their commands before gcloud's parser."""

import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tools import ROOT, need_deploy_tools

SCRIPTS = ROOT / "deploy" / "gke" / "cluster"
EXAMPLE = SCRIPTS / "config.example.env"
FAKE = ROOT / "tests" / "fake_gcloud.py"
LOOKS = {"describe", "get"}
ALL_POOLS = 'GPU_POOLS="l4 l4-spot a100-80gb a100-80gb-spot h100-80gb h100-80gb-spot"\n'
DATA = {"artifacts repositories cabochon", "storage buckets gs://my-project-cabochon"}


class Cloud:
    """A folder with a configuration, and gcloud and kubectl that work on it."""

    def __init__(self, folder: Path, changes: str = "") -> None:
        self.folder = folder
        self.config = folder / "config.env"
        self.config.write_text(EXAMPLE.read_text() + changes)
        (folder / "bin").mkdir()
        for name in ("gcloud", "kubectl"):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {FAKE} {folder} {name} "$@"\n')
            program.chmod(0o755)

    def run(self, script: str, *options: str, says: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a script to its end, whatever that is."""
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", str(SCRIPTS / script), "--config", str(self.config), *options],
            env={"PATH": path, "HOME": str(self.folder)}, cwd="/", input=says, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip

    def done(self, script: str, *options: str) -> list[list[str]]:
        """The calls of a run that succeeds."""
        before = len(self.calls())
        run = self.run(script, *options)
        assert run.returncode == 0, run.stdout[-500:] + run.stderr
        return self.calls()[before:]

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def things(self) -> set[str]:
        """What exists and costs or stands in the way; enabled services do neither."""
        return {name for name in self.state()["things"] if not name.startswith("service ")}


def changes(calls: Iterable[list[str]]) -> list[list[str]]:
    return [call for call in calls if not LOOKS & set(call[:6])]


def written(text: str) -> list[list[str]]:
    """The commands of a dry run, looks first as they stand there."""
    lines = text.replace(" >/dev/null 2>&1 ||\n", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line)) and words[0] != "export"]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dry run, create, create again, teardown, teardown again, with all node pools: what each did."""
    cloud = Cloud(tmp_path_factory.mktemp("cloud"), ALL_POOLS)
    told: dict[str, Any] = {"dry": cloud.run("create.sh", "--dry-run"), "calls after dry run": cloud.calls()}
    for name, script, *options in (
        ("create", "create.sh"), ("again", "create.sh"),
        ("down", "teardown.sh", "--yes"), ("down again", "teardown.sh", "--yes"),
    ):  # fmt: skip
        told[name], told[f"state after {name}"] = cloud.done(script, *options), cloud.state()
        told[f"things after {name}"] = cloud.things()
    told["dry down"] = cloud.run("teardown.sh", "--dry-run")
    return told


def test_a_dry_run_calls_nothing_and_writes_what_a_run_does(story: dict[str, Any]) -> None:
    assert story["dry"].returncode == 0, story["dry"].stderr
    assert story["calls after dry run"] == []
    assert written(story["dry"].stdout) == story["create"]
    assert changes(written(story["dry down"].stdout)) == changes(story["down"])


def test_every_command_is_there_once(story: dict[str, Any]) -> None:
    for name in ("create", "down"):
        commands = [shlex.join(call) for call in story[name]]
        assert len(commands) == len(set(commands)), name


def test_each_creation_looks_first_and_nothing_is_made_twice(story: dict[str, Any]) -> None:
    for before, call in zip(story["create"], story["create"][1:], strict=False):
        if "create" in call:
            assert call[call.index("create") - 1] == before[before.index("describe") - 1], call
    assert not [call for call in story["again"] if "create" in call]
    same = ("things", "bindings")
    assert [story["state after create"][key] for key in same] == [
        story["state after again"][key] for key in same
    ]


def test_teardown_takes_away_all_that_create_made(story: dict[str, Any]) -> None:
    assert story["things after create"]
    assert story["things after down"] == story["things after down again"] == set()
    assert story["state after create"]["bindings"]
    assert story["state after down"]["bindings"] == []


def test_the_namespace_goes_before_its_cluster(story: dict[str, Any]) -> None:
    """Its Gateway's load balancer would outlive it and hold the network."""
    order = [" ".join(call[:4]) for call in story["down"]]
    assert order.index("kubectl delete namespace cabochon") < order.index("gcloud container clusters delete")


def test_names_are_those_of_the_manifests(story: dict[str, Any]) -> None:
    account = "cabochon@my-project.iam.gserviceaccount.com"
    bindings = [tuple(entry) for entry in story["state after create"]["bindings"]]
    assert [entry for entry in bindings if account in entry[0] + entry[1]] == [
        ("projects my-project", f"serviceAccount:{account}", "roles/modelarmor.user"),
        ("projects my-project", f"serviceAccount:{account}", "roles/modelarmor.viewer"),
        (
            "storage buckets gs://my-project-cabochon",
            f"serviceAccount:{account}",
            "roles/storage.objectViewer",
        ),
        (
            f"iam service-accounts {account}",
            "serviceAccount:my-project.svc.id.goog[cabochon/cabochon]",
            "roles/iam.workloadIdentityUser",
        ),
    ], "and no other right"
    things = story["state after create"]["things"]
    assert "artifacts repositories cabochon" in things
    pools = {name: flags for name, flags in things.items() if name.startswith("container node-pools")}
    kinds = {flags["--accelerator"].split(",")[0] for flags in pools.values()}
    assert kinds == {"type=nvidia-l4", "type=nvidia-a100-80gb", "type=nvidia-h100-80gb"}
    assert {name for name, flags in pools.items() if "--spot" in flags} == {
        name for name in pools if name.endswith("-spot")
    }


def test_the_cluster_is_private_and_has_what_the_manifests_need(story: dict[str, Any]) -> None:
    flags = story["state after create"]["things"]["container clusters cabochon"]
    assert {"--enable-private-nodes", "--no-enable-ip-access", "--enable-dataplane-v2"} <= set(flags)
    assert flags["--gateway-api"] == "standard"
    assert flags["--workload-pool"] == "my-project.svc.id.goog"
    assert "GcsFuseCsiDriver" in flags["--addons"]
    assert "RayOperator" not in flags["--addons"], "KubeRay is applied instead"
    assert any("kuberay" in call[-1] for call in story["create"])


def test_the_private_name_of_model_armor_is_that_of_the_client(story: dict[str, Any]) -> None:
    things = story["state after create"]["things"]
    host = "modelarmor.us-central1.rep.googleapis.com"
    endpoint = things["network-connectivity regional-endpoints cabochon-model-armor"]
    assert endpoint["--target-google-api"] == host
    record = things[f"dns record-sets {host}."]
    assert record["--rrdatas"] == things["compute addresses cabochon-model-armor"]["--addresses"]
    client = (ROOT / "server" / "armor" / "config.py").read_text()
    assert "modelarmor.LOCATION.rep.googleapis.com" in client
    filters = things["model-armor templates cabochon-prompt"]["--rai-settings-filters"]
    assert {entry["filterType"] for entry in json.loads(filters)} == {
        "HATE_SPEECH", "HARASSMENT", "SEXUALLY_EXPLICIT", "DANGEROUS",
    }  # fmt: skip


def test_without_model_armor_and_with_the_addon(tmp_path: Path) -> None:
    run = Cloud(tmp_path, "MODEL_ARMOR=false\nRAY_OPERATOR=addon\n").run("create.sh", "--dry-run")
    commands = [shlex.join(words) for words in written(run.stdout)]
    assert not [line for line in commands if "armor" in line or "dns" in line.replace("dns-", "")]
    assert not [line for line in commands if "kuberay" in line]
    assert any("GcsFuseCsiDriver,RayOperator" in line for line in commands)


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", [2, 9, 15, 20])
def test_after_an_interruption_the_next_run_ends_the_work(
    tmp_path: Path, story: dict[str, Any], fail_at: int
) -> None:
    cloud = Cloud(tmp_path, ALL_POOLS)
    (tmp_path / "fail_at").write_text(str(fail_at))
    assert cloud.run("create.sh").returncode != 0
    cloud.done("create.sh")
    assert cloud.state()["things"] == story["state after create"]["things"]
    (tmp_path / "fail_at").write_text(str(cloud.state()["changes"] + fail_at))
    assert cloud.run("teardown.sh", "--yes").returncode != 0
    cloud.done("teardown.sh", "--yes")
    assert cloud.things() == set()


def test_who_may_not_look_is_told_so_and_changes_nothing(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    (tmp_path / "blind").touch()
    run = cloud.run("create.sh")
    assert run.returncode == 1
    assert "permission to look is missing" in run.stderr
    assert [call[1] for call in changes(cloud.calls())] == ["services"], "only services were enabled"


def test_teardown_asks_for_the_name_and_can_keep_data(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, "MODEL_ARMOR=false\n")
    for typed in ("yes\n", ""):
        run = cloud.run("teardown.sh", says=typed)
        assert run.returncode == 2
        assert "nothing was deleted" in run.stderr
    assert cloud.calls() == []
    cloud.done("create.sh")
    assert cloud.run("teardown.sh", "--keep-data", says="my-project\n").returncode == 0
    assert cloud.things() == DATA


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("BUCKET=", (), r"BUCKET must have a value, .*config.env gives none: see config.example.env"),
        ("GPU_POOLS=t4", (), r"GPU_POOLS must be of l4, .* got t4: edit the configuration"),
        ("RAY_OPERATOR=helm", (), r"RAY_OPERATOR must be one of kuberay addon, got helm: edit"),
        ("MODEL_ARMOR=yes", (), r"MODEL_ARMOR must be one of true false, got yes: edit"),
        ("", ("--force",), r"options are .*, got --force"),
        ("", ("--config", "/nowhere"), r"must be readable, /nowhere is not: copy config.example.env"),
    ],
)
@pytest.mark.parametrize("script", ["create.sh", "teardown.sh"])
def test_a_mistake_is_named_before_anything_is_done(
    tmp_path: Path, script: str, line: str, options: tuple[str, ...], message: str
) -> None:
    cloud = Cloud(tmp_path, line + "\n")
    run = cloud.run(script, *options)
    assert run.returncode == 2
    assert re.search(message, run.stderr), run.stderr
    assert cloud.calls() == []


def test_ranges_of_the_example_lie_apart() -> None:
    values = dict(re.findall(r"^(\w+)=([\d./]+)$", EXAMPLE.read_text(), re.MULTILINE))
    names = ("NODE_RANGE", "POD_RANGE", "SERVICE_RANGE", "PROXY_RANGE")
    ranges = [ipaddress.ip_network(values[name]) for name in names]
    for index, one in enumerate(ranges):
        assert not any(one.overlaps(other) for other in ranges[index + 1 :])
    assert ipaddress.ip_address(values["MODEL_ARMOR_ADDRESS"]) in ranges[0]


def test_shellcheck_finds_nothing() -> None:
    checker = need_deploy_tools() / "shellcheck"
    files = [str(SCRIPTS / name) for name in ("create.sh", "teardown.sh", "config.example.env")]
    run = subprocess.run(
        [checker, "--external-sources", "--check-sourced", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_gcloud_knows_every_command_and_flag(tmp_path: Path, story: dict[str, Any]) -> None:
    """Its parser, without a network: the values of most flags are the service's to judge."""
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed, and no make target can: see cloud.google.com/sdk")
    commands = [shlex.join(call) for call in [*story["create"], *story["down"]] if call[0] == "gcloud"]
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": text} for text in dict.fromkeys(commands)]))
    run = subprocess.run(
        [gcloud, "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    answers = json.loads(run.stdout)
    assert len(answers) == len(set(commands))
    wrong = [f"{a['command_string']}: {a['error_message']}" for a in answers if not a["success"]]
    assert wrong == []
