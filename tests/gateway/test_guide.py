"""The recipe for the real picker in the guide is YAML, consistent, and has the weights of our picker."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cabochon.server.gateway.scheduling import Weights

GUIDE = Path(__file__).parents[2] / "docs/gateway.md"
SCORERS = {"queue-scorer": "queue", "kv-cache-utilization-scorer": "kv", "prefix-cache-scorer": "prefix"}


@pytest.fixture
def files() -> dict[str, Any]:
    """What the recipe writes, by name."""
    found = re.findall(r"cat > (\S+) <<'END'\n(.*?)END\n", GUIDE.read_text(), re.DOTALL)
    return {name: yaml.safe_load(text) for name, text in found}


def test_the_endpoints_are_addresses_with_ports_as_text(files: dict[str, Any]) -> None:
    for endpoint in files["endpoints.yaml"]["endpoints"]:
        assert re.fullmatch(r"[\d.]+", endpoint["address"])
        assert isinstance(endpoint["port"], str)
        assert endpoint["labels"] == {"llm-d.ai/engine-type": "vllm"}


def test_every_plugin_that_is_referred_to_is_declared(files: dict[str, Any]) -> None:
    config = files["epp.yaml"]
    declared = {plugin.get("name", plugin["type"]) for plugin in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= declared
    assert config["dataLayer"]["discovery"]["pluginRef"] in declared
    assert config["plugins"][0]["parameters"]["path"] == "endpoints.yaml"


def test_its_weights_are_those_of_our_picker(files: dict[str, Any]) -> None:
    (profile,) = files["epp.yaml"]["schedulingProfiles"]
    weights = {SCORERS[plugin["pluginRef"]]: plugin["weight"] for plugin in profile["plugins"]}
    assert Weights(**weights) == Weights()
