"""docs/fine-tunes.md is true: its sizes are ours, its options exist, its YAML is what it says."""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from random_gemma import model_config
from transformers import Gemma2Config

from cabochon.engine.adapters.adapter import slot_bytes
from cabochon.engine.config import EngineConfig
from cabochon.server.settings import option_help

PAGE = (Path(__file__).parents[1] / "docs" / "fine-tunes.md").read_text()
YAML = [
    yaml.safe_load(textwrap.dedent(text))
    for text in re.findall(r"^ *```yaml\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
]
SIZES = {  # hidden, mlp, layers, heads, KV heads, head dimension: of Google's checkpoints
    "2B": (2304, 9216, 26, 8, 4, 256),
    "9B": (3584, 14336, 42, 16, 8, 256),
    "27B": (4608, 36864, 46, 32, 16, 128),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_are_those_of_our_adapters(name: str) -> None:
    hidden, mlp, layers, heads, kv_heads, head_dim = SIZES[name]
    model = model_config(
        Gemma2Config(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
        )
    )
    sizes = [f"{slot_bytes(model, rank, 2) / 1e6:.0f} MB" for rank in (8, 16, 64)]
    slots = f"{8 * slot_bytes(model, 64, 2) / 1e9:.1f} GB"
    assert f"| Gemma 2 {name} | {' | '.join(sizes)} | {slots} |" in PAGE


def test_every_option_that_the_page_names_exists() -> None:
    flags = set(re.findall(r"--[a-z-]+", option_help()))
    others = {"--config", "--fail-with-body"}  # ours, which is no setting, and curl's
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", PAGE)) <= flags | others


def test_the_configuration_is_one_that_the_engine_takes() -> None:
    (config,) = [document for document in YAML if "lora_dir" in document]
    assert set(config) <= {field.name for field in dataclasses.fields(EngineConfig)}
    made = EngineConfig(**{**config, "lora_modules": tuple(config["lora_modules"])})
    assert made.num_slots


def test_the_pod_reads_adapters_where_the_configuration_looks_for_them() -> None:
    (pod,) = [document["spec"] for document in YAML if "containers" in document.get("spec", {})]
    (config,) = [document for document in YAML if "lora_dir" in document]
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == config["lora_dir"]
    assert mount["name"] == pod["volumes"][0]["name"]
    assert all(
        module.partition("=")[2].startswith(f"{config['lora_dir']}/") for module in config["lora_modules"]
    )


def test_the_canary_shifts_between_adapters_that_are_loaded() -> None:
    """One by the configuration, one by the loop of curl."""
    (rewrite,) = [document for document in YAML if document.get("kind") == "InferenceModelRewrite"]
    (config,) = [document for document in YAML if "lora_dir" in document]
    loaded = {module.partition("=")[0] for module in config["lora_modules"]}
    loaded |= set(re.findall(r'"lora_name": "([^"]+)"', PAGE))
    (rule,) = rewrite["spec"]["rules"]
    assert {target["modelRewrite"] for target in rule["targets"]} == loaded
    assert all(isinstance(target["weight"], int) for target in rule["targets"])


def test_the_picker_scores_by_plugins_that_it_has() -> None:
    (picker,) = [document for document in YAML if document.get("kind") == "EndpointPickerConfig"]
    plugins = {plugin["type"] for plugin in picker["plugins"]}
    (profile,) = picker["schedulingProfiles"]
    scorers: list[dict[str, Any]] = profile["plugins"]
    assert {scorer["pluginRef"] for scorer in scorers} == plugins
    assert "lora-affinity-scorer" in plugins
