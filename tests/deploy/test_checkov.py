"""checkov finds nothing in a site that is not explained here."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from kustomized import head_of, labels_of, rendered, worker_of
from tools import need_deploy_tools

EXPLAINED = {
    # A fixed tag is not pulled again: a registry that is away stops no restart
    ("CKV_K8S_15", "Deployment.cabochon.cabochon-picker"),
    ("CKV_K8S_15", "StatefulSet.cabochon.redis"),
    ("CKV_K8S_15", "Pod.cabochon.head"),
    ("CKV_K8S_15", "Pod.cabochon.worker"),
    # Nobody outside redis' own pod reads its environment; its only other way is an argument
    ("CKV_K8S_35", "StatefulSet.cabochon.redis"),
    # They ask the Kubernetes API: the picker for pods, the autoscaler, beside the head, too
    ("CKV_K8S_38", "Deployment.cabochon.cabochon-picker"),
    ("CKV_K8S_38", "Pod.cabochon.head"),
    # The images' own users are 999 and 1000; no host path is mounted that a host's user could own
    ("CKV_K8S_40", "StatefulSet.cabochon.redis"),
    ("CKV_K8S_40", "Pod.cabochon.head"),
    ("CKV_K8S_40", "Pod.cabochon.worker"),
    # Digests are a site's to pin: `images:` of kustomize takes them
    ("CKV_K8S_43", "Deployment.cabochon.cabochon-picker"),
    ("CKV_K8S_43", "StatefulSet.cabochon.redis"),
    ("CKV_K8S_43", "Pod.cabochon.head"),
    ("CKV_K8S_43", "Pod.cabochon.worker"),
}


@pytest.mark.slow
def test_checkov_finds_what_is_explained_and_nothing_else(tmp_path: Path) -> None:
    """It does not know RayService: its pod templates are shown as pods."""
    documents = rendered("sites/example")
    shown = [document for document in documents if document["kind"] != "RayService"]
    for name, template in (("head", head_of(documents)), ("worker", worker_of(documents))):
        metadata = {"name": name, "namespace": "cabochon", "labels": labels_of(template, name)}
        shown.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    (tmp_path / "site.yaml").write_text(yaml.safe_dump_all(shown))
    command = [need_deploy_tools() / "checkov", "--directory", ".", "--framework", "kubernetes"]
    run = subprocess.run(
        [*command, "--skip-download", "--output", "json"], cwd=tmp_path, capture_output=True, text=True
    )
    report = json.loads(run.stdout)
    assert report["summary"]["passed"] > 100
    assert report["summary"]["parsing_errors"] == 0
    found = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    assert found == EXPLAINED
