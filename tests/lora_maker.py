"""LoRA adapters as the peft library would save them, made without it: quick, and random in both matrices.

    make_adapter(tmp_path / "a", load_model_config(model_dir), 8, seed=1)

The directory is what `--lora-modules`, `read_adapter` and peft's own `PeftModel.from_pretrained` take.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cabochon.engine.adapters.adapter import PARTS, linear_shapes
from cabochon.engine.models.config import ModelConfig

TARGETS = tuple(part.partition(".")[2] for parts in PARTS.values() for part in parts)  # q_proj ... down_proj
PREFIX = "base_model.model.model"


def make_adapter(
    directory: Path,
    model: ModelConfig,
    rank: int,
    *,
    alpha: float | None = None,
    seed: int = 0,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    rslora: bool = False,
    std: float = 0.05,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors into `directory`, which is made. Returns it.

    rank: of every module. alpha: None is 2 · rank. targets: such as ("q_proj", "down_proj"), all seven by
    default. layers: which have it, None all. std: of lora_B; A keeps the variance of its input, so that
    0.05 at rank 8 changes a unit output by about 0.3. config: further keys of adapter_config.json, or others'
    values.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        adapter_tensors(model, rank, seed=seed, targets=targets, layers=layers, std=std, dtype=dtype),
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tests/random-gemma",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "use_rslora": rslora,
        "target_modules": list(targets),
        "layers_to_transform": None if layers is None else list(layers),
        "bias": "none",
        "inference_mode": True,
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


def adapter_tensors(
    model: ModelConfig,
    rank: int,
    *,
    seed: int = 0,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    std: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """lora_A [rank, k] and lora_B [n, rank] of every module, by peft's names."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.num_layers) if layers is None else layers:
        for linear, shape in linear_shapes(model).items():
            for part, start, end in zip(PARTS[linear], (0, *shape.part_ends), shape.part_ends, strict=False):
                if part.partition(".")[2] in targets:
                    name = f"{PREFIX}.layers.{layer}.{part}"
                    a = torch.randn(rank, shape.k, generator=g) * shape.k**-0.5
                    b = torch.randn(end - start, rank, generator=g) * std
                    tensors |= {f"{name}.lora_A.weight": a.to(dtype), f"{name}.lora_B.weight": b.to(dtype)}
    return tensors
