"""Who reaches whom: the NetworkPolicies, by Kubernetes' rules, against what must work and what must not."""

import ipaddress
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kustomized import GKE, Document, head_of, labels_of, matches, of_kind, one, pods_of, rendered, worker_of

HUB = ("overlays/gemma2-9b-h100", "weights-hub")
BUCKET = ("overlays/gemma2-9b-h100", "weights-gcs-fuse", "model-armor")
LOCAL = ("overlays/local-cpu",)


class Peer(NamedTuple):
    """A pod, or an address outside of the cluster."""

    labels: dict[str, str] | None = None
    namespace: str = "cabochon"
    address: str | None = None


def peer_of(documents: tuple[Document, ...], name: str) -> Peer:
    outside = {
        "proxy": "10.9.0.7",
        "health check": "35.191.3.4",
        "stranger": "10.0.0.9",
        "internet": "203.0.113.5",
        "private.googleapis.com": "199.36.153.9",
        "metadata": "169.254.169.252",
        "model armor": "10.0.15.250",
    }
    if name in outside:
        return Peer(address=outside[name])
    others = {
        "dns": Peer({"k8s-app": "kube-dns"}, "kube-system"),
        "operator": Peer({"app.kubernetes.io/component": "kuberay-operator"}, "default"),
        "collector": Peer({"app.kubernetes.io/name": "collector"}, "gmp-system"),
        "neighbour": Peer({"app": "cabochon-client"}, "default"),
        "head": Peer(labels_of(head_of(documents), "head")),
        "worker": Peer(labels_of(worker_of(documents), "worker")),
        "redis cleanup": Peer(labels_of(head_of(documents), "redis-cleanup")),
    }
    if name in others:
        return others[name]
    (labels,) = [pod["metadata"]["labels"] for pod_name, pod in pods_of(documents) if pod_name == name]
    return Peer(labels)


def means(rule_peer: Any, peer: Peer) -> bool:
    if "ipBlock" in rule_peer:
        assert rule_peer["ipBlock"].keys() == {"cidr"}
        network = ipaddress.ip_network(rule_peer["ipBlock"]["cidr"])
        return peer.address is not None and ipaddress.ip_address(peer.address) in network
    if peer.labels is None:
        return False
    namespaces = rule_peer.get("namespaceSelector")
    in_namespace = (
        peer.namespace == "cabochon"
        if namespaces is None
        else matches(namespaces, {"kubernetes.io/metadata.name": peer.namespace})
    )
    return in_namespace and matches(rule_peer.get("podSelector", {}), peer.labels)


def one_way(documents: tuple[Document, ...], pod: Peer, other: Peer, port: int, way: str) -> bool:
    """Whether the policies of `pod`, in our namespace, let this through. way: Ingress or Egress."""
    rules_key, peers_key = {"Ingress": ("ingress", "from"), "Egress": ("egress", "to")}[way]
    assert pod.labels is not None
    policies = [
        policy["spec"]
        for policy in of_kind(documents, "NetworkPolicy")
        if way in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    return not policies or any(
        (peers_key not in rule or any(means(peer, other) for peer in rule[peers_key]))
        and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
        for policy in policies
        for rule in policy.get(rules_key, [])
    )


def reaches(documents: tuple[Document, ...], source_name: str, target_name: str, port: int) -> bool:
    source, target = peer_of(documents, source_name), peer_of(documents, target_name)
    leaves = (
        source.address or source.namespace != "cabochon" or one_way(documents, source, target, port, "Egress")
    )
    enters = (
        target.address
        or target.namespace != "cabochon"
        or one_way(documents, target, source, port, "Ingress")
    )
    return bool(leaves and enters)


NEEDED = [
    (BUCKET, "proxy", "worker", 8000),  # requests
    (BUCKET, "health check", "worker", 8000),
    (BUCKET, "proxy", "cabochon-picker", 9002),  # ext_proc
    (BUCKET, "health check", "cabochon-picker", 9003),
    (BUCKET, "cabochon-picker", "worker", 8000),  # 20 scrapes a second
    (BUCKET, "collector", "worker", 8000),
    (BUCKET, "collector", "cabochon-picker", 9090),
    (BUCKET, "cabochon-picker", "internet", 443),  # the Kubernetes API
    (BUCKET, "head", "internet", 443),  # the same, for the autoscaler
    (BUCKET, "head", "redis", 6379),
    (BUCKET, "redis cleanup", "redis", 6379),
    (BUCKET, "worker", "head", 6379),  # GCS
    (BUCKET, "head", "worker", 31234),  # Ray's ports are random
    (BUCKET, "worker", "worker", 31234),
    (BUCKET, "operator", "head", 8265),
    (BUCKET, "worker", "dns", 53),
    (BUCKET, "worker", "private.googleapis.com", 443),
    (BUCKET, "worker", "metadata", 988),
    (BUCKET, "worker", "model armor", 443),
    (HUB, "worker", "internet", 443),
    (LOCAL, "worker", "head", 6379),
    (LOCAL, "head", "worker", 8000),
]
FORBIDDEN = [
    (BUCKET, "worker", "internet", 443),  # text of clients stays here
    (BUCKET, "worker", "redis", 6379),
    (BUCKET, "stranger", "worker", 8000),  # past the gateway
    (BUCKET, "neighbour", "worker", 8000),
    (BUCKET, "neighbour", "head", 8265),  # Ray's dashboard runs what it is given
    (BUCKET, "neighbour", "head", 10001),
    (BUCKET, "neighbour", "redis", 6379),
    (BUCKET, "proxy", "head", 8100),
    (BUCKET, "proxy", "worker", 8080),
    (BUCKET, "operator", "worker", 8000),
    (BUCKET, "cabochon-picker", "redis", 6379),
    (BUCKET, "cabochon-picker", "head", 8265),
    (BUCKET, "redis", "internet", 443),
    (BUCKET, "head", "model armor", 80),
    (HUB, "worker", "internet", 80),
    (LOCAL, "worker", "internet", 443),
]


@pytest.mark.parametrize(("parts", "source", "target", "port"), NEEDED)
def test_what_must_work_is_open(parts: tuple[str, ...], source: str, target: str, port: int) -> None:
    assert reaches(rendered(*parts), source, target, port)


@pytest.mark.parametrize(("parts", "source", "target", "port"), FORBIDDEN)
def test_all_else_is_shut(parts: tuple[str, ...], source: str, target: str, port: int) -> None:
    assert not reaches(rendered(*parts), source, target, port)


@pytest.mark.parametrize("parts", [HUB, BUCKET, LOCAL, (*BUCKET, "adapters")], ids="+".join)
def test_every_policy_is_of_some_pod(parts: tuple[str, ...]) -> None:
    documents = rendered(*parts)
    for policy in of_kind(documents, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        chosen = [name for name, pod in pods_of(documents) if matches(selector, pod["metadata"]["labels"])]
        assert chosen, policy["metadata"]["name"]
    deny = one(documents, "NetworkPolicy", "deny-all")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("component", ["weights-gcs-fuse", "adapters"])
def test_storage_has_the_address_that_is_open(component: str) -> None:
    documents = rendered("overlays/gemma2-9b-h100", component)
    (alias,) = worker_of(documents)["spec"]["hostAliases"]
    assert "storage.googleapis.com" in alias["hostnames"]
    worker = Peer(labels_of(worker_of(documents), "worker"))
    assert one_way(documents, worker, Peer(address=alias["ip"]), 443, "Egress")


@pytest.mark.parametrize("example", sorted(GKE.glob("cluster/*.env")), ids=lambda path: path.name)
def test_addresses_are_those_of_the_cluster(example: Path) -> None:
    """The load balancer's proxies, and Model Armor's private endpoint."""
    values = dict(re.findall(r"^([A-Z_]+)=(\S+)$", example.read_text(), re.MULTILINE))
    documents = rendered(*BUCKET)
    for policy in ("replicas", "picker"):
        ingress = one(documents, "NetworkPolicy", policy)["spec"]["ingress"]
        assert values["PROXY_RANGE"] in [peer["ipBlock"]["cidr"] for peer in ingress[0]["from"]]
    egress = one(documents, "NetworkPolicy", "model-armor")["spec"]["egress"]
    assert egress[0]["to"] == [{"ipBlock": {"cidr": f"{values['MODEL_ARMOR_ADDRESS']}/32"}}]
