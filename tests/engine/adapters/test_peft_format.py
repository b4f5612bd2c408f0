"""Adapters of the real peft library: our deltas are its own, for every option that we follow."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_maker import TARGETS, adapter_tensors, make_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from random_gemma import model_config, random_gemma2, random_gemma3
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from cabochon.engine.adapters.adapter import PARTS, Adapter, linear_shapes
from cabochon.engine.adapters.peft_format import read_adapter
from cabochon.engine.models.config import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

MODEL = model_config(random_gemma2().config)
FP32, BF16 = torch.float32, torch.bfloat16
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read(directory: Path, dtype: torch.dtype = FP32, *, max_rank: int = 64) -> Adapter:
    return read_adapter(directory, MODEL, dtype, max_rank=max_rank)


def peft_adapter(directory: Path, make: Callable[[], Any], **options: Any) -> ModelConfig:
    """Saved as peft saves it, random in B too. Returns the model's configuration."""
    base = make()
    config = LoraConfig(**{"r": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base, config)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=g) * 0.3)
    model.save_pretrained(directory)
    return model_config(base.config)


def deltas(adapter: Adapter, model: ModelConfig) -> dict[str, Tensor]:
    """b @ a of every part of every layer that has a Delta: [n, k], by the module's name."""
    found = {}
    for layer, linears in enumerate(adapter.layers):
        for linear, delta in linears.items():
            ends = linear_shapes(model)[linear].part_ends
            for i, part in enumerate(PARTS[linear]):
                a = delta.a[i * adapter.rank : (i + 1) * adapter.rank]
                b = delta.b[ends[i - 1] if i else 0 : ends[i]]
                found[f"model.layers.{layer}.{part}"] = b @ a
    return found


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": 16, "lora_alpha": 4.5},
        {"r": 64, "lora_alpha": 64},
        {"r": 8, "lora_alpha": 16, "use_rslora": True},
        {"target_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "up_proj", "down_proj"]},
        {"target_modules": r".*layers\.[12]\..*(k_proj|gate_proj)"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [0, 3]},
        {"exclude_modules": ["k_proj"], "lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q_proj": 4, r"layers.[02].mlp.*": 32}, "alpha_pattern": {"up_proj": 3}},
        {"rank_pattern": {"^model.layers.1.self_attn.v_proj": 2}, "use_rslora": True},
        {"alpha_pattern": {r"^model\.layers\.\d+\..*(q|k)_proj": 3, "mlp.(?:up|down)_[^x]+": 5}},
        {"alpha_pattern": {"layers.1.self_attn.v_proj": 1, "v_proj": 2, r".*": 7}},
    ],
    ids=str,
)
def test_deltas_equal_those_of_peft(tmp_path: Path, make: Callable[[], Any], options: dict[str, Any]) -> None:
    model = peft_adapter(tmp_path, make, **options)
    oracle = PeftModel.from_pretrained(
        make(), tmp_path
    )  # a saved configuration has its patterns in another order
    adapter = read_adapter(tmp_path, model, FP32, max_rank=64)
    ours = deltas(adapter, model)
    theirs = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in oracle.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert theirs
    assert set(theirs) <= set(ours)
    for name, delta in ours.items():
        expected = theirs.get(name, torch.zeros_like(delta))
        torch.testing.assert_close(
            delta, expected.detach(), rtol=1e-6, atol=1e-6 * float(expected.abs().max())
        )
    assert adapter.rank == max(
        layer.r["default"] for _, layer in oracle.named_modules() if hasattr(layer, "r")
    )


def test_linear_layers_that_are_not_adapted_have_no_delta(tmp_path: Path) -> None:
    adapter = read(make_adapter(tmp_path, MODEL, 4, targets=("v_proj", "down_proj"), layers=(2,)))
    assert [set(layer) for layer in adapter.layers] == [set(), set(), {"qkv", "down"}, set()]
    qkv = adapter.layers[2]["qkv"]
    assert not qkv.a[:8].any(), "of q and k"
    assert not qkv.b[: linear_shapes(MODEL)["qkv"].part_ends[1]].any()
    assert adapter.num_bytes == 4 * (qkv.a.numel() + qkv.b.numel() + 4 * (96 + 64))


@pytest.mark.parametrize("prefix", ["model.language_model", "language_model.model"])
@pytest.mark.parametrize("suffix", [".weight", ".default.weight"])
def test_names_of_checkpoints_with_images_and_of_states_are_read(
    tmp_path: Path, prefix: str, suffix: str
) -> None:
    expected = deltas(read(make_adapter(tmp_path / "plain", MODEL, 4)), MODEL)
    pattern = {rf"^{prefix}\.layers\.1\..*": 4}  # patterns match the names as they are in the file
    other = make_adapter(tmp_path / "other", MODEL, 4, r=8, rank_pattern={**pattern, ".*": 4})
    renamed = {
        name.replace("base_model.model.model.", f"base_model.model.{prefix}.").replace(
            ".weight", suffix
        ): tensor
        for name, tensor in adapter_tensors(MODEL, 4).items()
    }
    save_file(renamed, other / WEIGHTS)
    for name, delta in deltas(read(other), MODEL).items():
        assert torch.equal(delta, expected[name])


@pytest.mark.parametrize("stored", [torch.float64, FP32, torch.float16, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_values_are_scaled_in_fp32_and_rounded_once(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    make_adapter(tmp_path, MODEL, 4, alpha=3, rslora=True, targets=("down_proj",), dtype=stored)
    raw = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    delta = read(tmp_path, dtype).layers[1]["down"]
    assert delta.a.dtype == delta.b.dtype == dtype
    assert torch.equal(delta.a, raw[name.format("A")].to(dtype))
    assert torch.equal(delta.b, (raw[name.format("B")].float() * (3 / math.sqrt(4))).to(dtype))


def test_tensors_stay_valid_when_the_file_changes(tmp_path: Path) -> None:
    adapter = read(make_adapter(tmp_path, MODEL, 4))
    before = {name: delta.clone() for name, delta in deltas(adapter, MODEL).items()}
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(adapter, MODEL).items())


# What older versions wrote, as far as their configurations differ from today's
PEFT_0_4 = {
    "auto_mapping": None, "base_model_name_or_path": "google/gemma-2-2b", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.1, "modules_to_save": None,
    "peft_type": "LORA", "r": 4, "revision": None, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
PEFT_0_13 = PEFT_0_4 | {
    "alpha_pattern": {}, "layer_replication": None, "loftq_config": {}, "megatron_config": None,
    "megatron_core": "megatron.core", "rank_pattern": {}, "use_dora": False, "use_rslora": False,
    "auto_mapping": {"base_model_class": "Gemma2ForCausalLM", "parent_library": "transformers"},
    "eva_config": None, "exclude_modules": None, "lora_bias": False,
}  # fmt: skip


@pytest.mark.parametrize("config", [PEFT_0_4, PEFT_0_13], ids=["0.4", "0.13"])
def test_configurations_of_older_versions_are_read(tmp_path: Path, config: dict[str, Any]) -> None:
    make_adapter(tmp_path, MODEL, 4)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert read(tmp_path).base_model == config["base_model_name_or_path"]


def test_files_of_the_library_are_read_with_and_without_metadata(tmp_path: Path) -> None:
    make_adapter(tmp_path, MODEL, 4)
    for metadata in (None, {"format": "pt", "x": "y" * 1000}):
        (tmp_path / WEIGHTS).write_bytes(save(adapter_tensors(MODEL, 4), metadata))
        assert read(tmp_path).rank == 4
