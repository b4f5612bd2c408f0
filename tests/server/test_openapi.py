"""/openapi.json describes every field, and whatever it allows is answered without a 5xx."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fake_server import LiveServer, fake_app
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cabochon.engine.fake import FAKE_INFO, FakeEngine
from cabochon.server.openapi import BODIES

DOCUMENT = fake_app().openapi()
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def test_every_field_is_described() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    bare = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, about in schema.get("properties", {}).items()
        if not about.get("description")
    ]
    assert not bare
    assert all(schemas[kind.__name__]["description"] for kind in BODIES)
    assert schemas["ChatRequest"]["properties"].keys() >= {"user", "best_of", "tools", "temperature"}


def test_every_route_is_described() -> None:
    for path, routes in DOCUMENT["paths"].items():
        for method, route in routes.items():
            assert route["description"], f"{method} {path}"
            assert ("requestBody" in route) == (method == "post"), f"{method} {path}"


api = schemathesis.openapi.from_dict(DOCUMENT)


QUICK: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "max_examples": 10,
}


@api.parametrize()
@settings(**QUICK)
def test_what_the_document_allows_is_answered(case: Any, shared: LiveServer) -> None:
    case.call_and_validate(base_url=shared.url, checks=CHECKS)


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    engine = FakeEngine(dataclasses.replace(FAKE_INFO, max_loras=2))
    with LiveServer(engine=engine, lora_dir=tmp_path_factory.mktemp("loras")) as server:
        yield server


@api.include(path_regex="lora_adapter").parametrize()
@settings(**{**QUICK, "max_examples": 40})
def test_what_the_document_allows_of_adapters_is_answered(case: Any, with_adapters: LiveServer) -> None:
    case.call_and_validate(base_url=with_adapters.url, checks=CHECKS)


@pytest.mark.slow
@api.parametrize()
@settings(**{**QUICK, "max_examples": 40})
def test_much_of_what_the_document_allows_is_answered(case: Any, shared: LiveServer) -> None:
    case.call_and_validate(base_url=shared.url, checks=CHECKS)
