"""Every rendered object is one that its API server takes, fields and all; so do Serve and we our parts."""

import functools
import itertools
import json
from dataclasses import fields
from importlib import import_module
from typing import Any, get_type_hints

import kubernetes_validate
import pytest
import yaml
from kustomized import (
    COMPONENTS,
    OVERLAYS,
    SITES,
    Document,
    crdcheck,
    environment_of,
    head_of,
    one,
    rendered,
    worker_of,
)
from pydantic import TypeAdapter
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from cabochon.server.armor.config import ArmorConfig
from cabochon.server.deployment import NAME, app_builder
from cabochon.server.settings import PREFIX, Settings, load_arguments

KUBERNETES = "1.34"  # what the guide asks of a cluster
EXCLUSIVE = [  # of each set at most one may be in a site
    {"weights-gcs-fuse", "weights-hub", "weights-hyperdisk-ml"},
    {"compute-class-spot", "compute-class-flex-start", "compute-class-reservation", "confidential-nodes"},
    {"objectives-llm-d", "objectives-x-k8s"},
]
WEIGHTS, CLASSES, OBJECTIVES = (sorted(choices) for choices in EXCLUSIVE)
OTHERS = [name for name in COMPONENTS if not any(name in choices for choices in EXCLUSIVE)]
RENDERED = [
    *((f"overlays/{name}",) for name in OVERLAYS),
    *((f"sites/{name}",) for name in SITES),
    *(("overlays/gemma2-9b-h100", weights) for weights in WEIGHTS),
    *(
        ("overlays/gemma2-9b-h100", weights, compute_class, objectives, *OTHERS)
        for (weights, compute_class), objectives in zip(
            itertools.product(WEIGHTS, CLASSES), itertools.cycle(OBJECTIVES), strict=False
        )
    ),
]


@functools.cache
def errors_of(text: str) -> list[str]:
    """Of one object, in JSON: most are in many renderings."""
    checker, schemas = crdcheck()
    document = json.loads(text)
    errors: list[str] | None = checker.errors_of(document, schemas)
    if errors is not None:
        return errors
    try:  # Kubernetes' own
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("parts", RENDERED, ids="+".join)
def test_every_object_is_valid(parts: tuple[str, ...]) -> None:
    for document in rendered(*parts):
        assert errors_of(json.dumps(document)) == [], f"{document['kind']} {document['metadata']['name']}"


def test_every_component_is_in_a_rendering() -> None:
    assert {part for parts in RENDERED for part in parts[1:]} == set(COMPONENTS)


def test_the_checks_see_a_wrong_field() -> None:
    service = one(rendered("overlays/local-cpu"), "RayService")
    assert errors_of(json.dumps({**service, "spec": {**service["spec"], "upgrade": 1}}))
    account = one(rendered("overlays/local-cpu"), "ServiceAccount")
    assert errors_of(json.dumps({**account, "automount": False}))


@pytest.mark.parametrize("parts", RENDERED, ids="+".join)
def test_no_two_objects_have_the_same_name(parts: tuple[str, ...]) -> None:
    names = [
        (document["kind"], document["apiVersion"].split("/")[0], document["metadata"]["name"])
        for document in rendered(*parts)
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("parts", RENDERED, ids="+".join)
def test_all_is_in_one_namespace(parts: tuple[str, ...]) -> None:
    for document in rendered(*parts):
        is_global = document["kind"] in ("Namespace", "ComputeClass", "PersistentVolume")
        assert document["metadata"].get("namespace") == (None if is_global else "cabochon"), document["kind"]


def application(documents: tuple[Document, ...]) -> Any:
    config = yaml.safe_load(one(documents, "RayService")["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    (found,) = schema.applications
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_takes_its_config_and_finds_the_application(overlay: str) -> None:
    found = application(rendered(f"overlays/{overlay}"))
    assert found.import_path == f"{app_builder.__module__}:{app_builder.__name__}"
    assert [deployment.name for deployment in found.deployments] == [NAME]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_wants_no_more_replicas_than_ray_has_workers(overlay: str) -> None:
    documents = rendered(f"overlays/{overlay}")
    (group,) = one(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (deployment,) = application(documents).deployments
    if isinstance(deployment.autoscaling_config, dict):
        scaling = AutoscalingConfig.model_validate(deployment.autoscaling_config)
        module, name = scaling.policy.policy_function.split(":")
        getattr(import_module(module), name)(**scaling.policy.policy_kwargs)  # takes what it is given
        assert (scaling.min_replicas, scaling.max_replicas) == (group["minReplicas"], group["maxReplicas"])
        assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (0, 0)
    else:
        assert deployment.num_replicas == group["maxReplicas"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def options_of(documents: tuple[Document, ...]) -> dict[str, str]:
    """Options by name, without their prefix: the application is built on the head."""
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment_of(documents, head_of(documents)).items()
        if name.startswith(PREFIX)
    }


def settings_of(documents: tuple[Document, ...]) -> Settings:
    """As load_arguments makes them. Options of Model Armor are not among them: armor_of."""
    options = options_of(documents)
    return load_arguments({name: value for name, value in options.items() if not name.startswith("armor_")})


def armor_of(documents: tuple[Document, ...]) -> ArmorConfig:
    given = {name: value for name, value in options_of(documents).items() if name.startswith("armor_")}
    assert set(given) <= {field.name for field in fields(ArmorConfig)}
    types = get_type_hints(ArmorConfig)
    filled = {name: value.replace("PROJECT", "p").replace("LOCATION", "l") for name, value in given.items()}
    return ArmorConfig(**{name: TypeAdapter(types[name]).validate_python(v) for name, v in filled.items()})


@pytest.mark.parametrize("parts", RENDERED, ids="+".join)
def test_our_options_are_options(parts: tuple[str, ...]) -> None:
    documents = rendered(*parts)
    settings = settings_of(documents)
    armor_of(documents)
    assert settings.engine.device == ("cpu" if "local" in parts[0] else "cuda")
    assert settings.server.port == 8000


@pytest.mark.parametrize("parts", RENDERED, ids="+".join)
def test_options_are_the_same_on_head_and_workers(parts: tuple[str, ...]) -> None:
    documents = rendered(*parts)
    head, worker = (
        {name: value for name, value in environment_of(documents, template).items() if "CABOCHON" in name}
        for template in (head_of(documents), worker_of(documents))
    )
    assert head == worker


def test_model_armor_is_told_its_templates_and_how_many_share_the_quota() -> None:
    documents = rendered("overlays/gemma2-9b-l4", "model-armor")
    armor = armor_of(documents)
    assert armor.armor_prompt_template is not None
    assert armor.armor_response_template is not None
    spec = one(documents, "RayService")["spec"]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}  # which has two clusters at once
    assert armor.armor_max_replicas == 2 * group["maxReplicas"]
