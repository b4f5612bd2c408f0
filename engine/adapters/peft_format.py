"""From a directory that peft saved to an Adapter: names, shapes and values checked against the model first.

Memory: the adapter in the working dtype, and one of its tensors as it is in the file. Heavy work is in reads
and in torch, which let other threads run.
"""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.engine.adapters.adapter import PARTS, Adapter, Delta, LinearName, LinearShape, linear_shapes
from cabochon.engine.adapters.peft_config import MERGE, PeftConfig, read_config, refused, shown
from cabochon.engine.adapters.tensor_file import DTYPES, TensorFile, TensorInfo
from cabochon.engine.models.config import ModelConfig

FILE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
ALL_PARTS = [part for parts in PARTS.values() for part in parts]
TARGETS = ", ".join(part.partition(".")[2] for part in ALL_PARTS)
# Gemma 3 with images, of transformers 4 or 5, has its text model one level deeper
NAME = re.compile(
    r"base_model\.model\.(?P<module>(?:model|model\.language_model|language_model\.model)"
    rf"\.layers\.(?P<layer>[0-9]{{1,5}})\.(?P<part>{'|'.join(map(re.escape, ALL_PARTS))}))"
    r"\.lora_(?P<matrix>[AB])(?:\.default)?\.weight"
)


class _Module(NamedTuple):
    """One adapted module: which tensors of the file, and what they are multiplied by."""

    a: str
    b: str
    rank: int
    scale: float
    name: str


_Modules = dict[tuple[int, str], _Module]  # by layer and part


def read_adapter(directory: Path, model: ModelConfig, dtype: torch.dtype, *, max_rank: int) -> Adapter:
    """The adapter in `directory`, ready for that model. Raises BadAdapter."""
    config = read_config(directory)
    with TensorFile(_weights(directory)) as file:
        modules = _match(file.infos, config, model, max_rank)
        rank = max(module.rank for module in modules.values())
        shapes = linear_shapes(model)
        layers: list[dict[LinearName, Delta]] = [
            {
                linear: _stack(file, modules, layer, linear, shapes[linear], rank, dtype)
                for linear, parts in PARTS.items()
                if any((layer, part) in modules for part in parts)
            }
            for layer in range(model.num_layers)
        ]
    return Adapter(rank=rank, layers=layers, base_model=config.base_model)


def _weights(directory: Path) -> Path:
    path = directory / FILE
    if path.is_file():
        return path
    if (directory / PICKLE).is_file():
        raise refused(
            f"an adapter's weights must be in {FILE}, {directory} has {PICKLE} alone, a pickle, which may run"
            " any code: convert it where you trust it, by PeftModel.from_pretrained and save_pretrained"
        )
    raise refused(f"an adapter's directory must have {FILE}, {directory} has none: give one that peft saved")


def _match(infos: dict[str, TensorInfo], config: PeftConfig, model: ModelConfig, max_rank: int) -> _Modules:
    """Every tensor to its module. Raises BadAdapter unless each is one that this model has a place for."""
    rank_of = config.lookup(config.rank_pattern, config.rank)
    alpha_of = config.lookup(config.alpha_pattern, config.alpha)
    modules = {}
    for (layer, part, name), matrices in _by_module(infos, config, model).items():
        if len(matrices) < 2:
            raise refused(
                f"each module must have lora_A and lora_B, {name} has lora_{min(matrices)} alone:"
                " save the adapter again"
            )
        rank = int(rank_of(name))
        if rank > max_rank:
            raise refused(
                f"ranks must be at most max_lora_rank = {max_rank}, {name} has {rank}: raise max_lora_rank"
            )
        module = _Module(matrices["A"], matrices["B"], rank, config.scale(alpha_of(name), rank), name)
        if (layer, part) in modules:
            raise refused(f"each module must be there once, {name} is there twice: save the adapter again")
        _check_shapes(infos, module, *_sizes(model, part), config)
        modules[layer, part] = module
    return modules


def _by_module(
    infos: dict[str, TensorInfo], config: PeftConfig, model: ModelConfig
) -> dict[tuple[int, str, str], dict[str, str]]:
    """By layer, part and the module's whole name: the tensor of each matrix, A or B. Raises BadAdapter."""
    found: dict[tuple[int, str, str], dict[str, str]] = defaultdict(dict)
    for name, info in infos.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise refused(f"every tensor must be lora_A or lora_B of {TARGETS}, got {shown(name)}: {MERGE}")
        if info.dtype not in DTYPES:
            raise refused(
                f"tensors must be {', '.join(DTYPES)}, {name} is {shown(info.dtype)}: save it in one of these"
            )
        layer = int(match["layer"])
        if layer >= model.num_layers:
            raise refused(
                f"layers must be below {model.num_layers} on this model, got {name}: {_other_model(config)}"
            )
        matrices = found[layer, match["part"], match["module"]]
        if match["matrix"] in matrices:
            raise refused(f"each tensor must be there once, {name} is there twice: save the adapter again")
        matrices[match["matrix"]] = name
    if not found:
        raise refused(
            f"an adapter must have lora_A and lora_B of {TARGETS}, {FILE} has no tensor: save it again"
        )
    return found


def _sizes(model: ModelConfig, part: str) -> tuple[int, int]:
    """Inputs and outputs of a part of a linear layer."""
    linear = next(name for name, parts in PARTS.items() if part in parts)
    shape = linear_shapes(model)[linear]
    start, end = _rows(shape, PARTS[linear].index(part))
    return shape.k, end - start


def _rows(shape: LinearShape, index: int) -> tuple[int, int]:
    return (shape.part_ends[index - 1] if index else 0), shape.part_ends[index]


def _check_shapes(infos: dict[str, TensorInfo], module: _Module, k: int, n: int, config: PeftConfig) -> None:
    for name, expected, models_axis in ((module.a, (module.rank, k), 1), (module.b, (n, module.rank), 0)):
        found = infos[name].shape
        if found == expected:
            continue
        if len(found) == 2 and found[models_axis] == expected[models_axis]:
            raise refused(
                f"{name} must have rank {module.rank} by adapter_config.json, its shape is {list(found)}:"
                " configuration and tensors are of different trainings, save both again"
            )
        raise refused(
            f"{name} must be {list(expected)} on this model, got {shown(list(found))}: {_other_model(config)}"
        )


def _other_model(config: PeftConfig) -> str:
    """What to do."""
    if config.base_model is None:
        return "it was trained on another model, serve that one"
    return f"it was trained on {shown(config.base_model)}, serve that model"


def _stack(
    file: TensorFile,
    modules: _Modules,
    layer: int,
    linear: LinearName,
    shape: LinearShape,
    rank: int,
    dtype: torch.dtype,
) -> Delta:
    """The parts of a linear layer as one Delta. Raises BadAdapter on a value that is not finite in dtype."""
    parts = PARTS[linear]
    a = torch.zeros(len(parts) * rank, shape.k, dtype=dtype)  # [P r, k]
    b = torch.zeros(shape.n, rank, dtype=dtype)  # [n, r]
    for index, part in enumerate(parts):
        module = modules.get((layer, part))
        if module is None:
            continue
        start, end = _rows(shape, index)
        rows, columns = a[index * rank :][: module.rank], b[start:end, : module.rank]
        rows.copy_(file.read(module.a))
        columns.copy_(file.read(module.b).float().mul_(module.scale))
        if not (_is_finite(rows) and _is_finite(columns)):
            raise refused(
                f"values must be finite, those of {module.name} are not (scaled, and in"
                f" {str(dtype).removeprefix('torch.')}): its training diverged, take an earlier checkpoint"
            )
    return Delta(a, b)


def _is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor))  # NaN is passed on; no copy is made
