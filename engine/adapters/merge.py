"""A checkpoint whose weights have an adapter added as they load: one fine-tune, at no cost while serving.

Before anything is packed or quantized, so that it works with every form of the linear layers.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from cabochon.engine.adapters.adapter import PARTS, Adapter, Delta, linear_shapes
from cabochon.engine.adapters.peft_format import read_adapter
from cabochon.engine.config import EngineConfig, split_module
from cabochon.engine.models.checkpoint import CPU, Checkpoint, Weights
from cabochon.engine.models.config import ModelConfig

NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class MergedWeights:
    """`weights` with B · A · scale added: in fp32, rounded once to the dtype asked for."""

    def __init__(self, weights: Weights, adapter: Adapter, model: ModelConfig) -> None:
        """adapter: in fp32, of that model."""
        self._weights = weights
        self._adapter = adapter
        self._shapes = linear_shapes(model)

    @property
    def num_elements(self) -> int:
        """Of the checkpoint: a merged weight is as large as its own."""
        return self._weights.num_elements

    def load(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
    ) -> Tensor:
        """The tensor `name`, which must have that shape, as dtype on the device. Raises BadCheckpoint."""
        delta = self._delta_of(name)
        if delta is None:
            return self._weights.load(name, shape, dtype, device)
        weight = self._weights.load(name, shape, torch.float32, device)  # [n, k]
        return weight.addmm_(delta.b.to(device), delta.a.to(device)).to(dtype)

    def close(self) -> None:
        """Close the checkpoint. Raises BadCheckpoint if a tensor was never asked for."""
        self._weights.close()

    def _delta_of(self, name: str) -> Delta | None:
        """A part's own rows of a and b: [r, k] and [n, r]."""
        match = NAME.fullmatch(name)
        if match is None:
            return None
        layer = self._adapter.layers[int(match[1])]
        for linear, parts in PARTS.items():
            if match[2] in parts and linear in layer:
                index, rank = parts.index(match[2]), self._adapter.rank
                ends = (0, *self._shapes[linear].part_ends)
                a, b = layer[linear]
                return Delta(a[index * rank : (index + 1) * rank], b[ends[index] : ends[index + 1]])
        return None


def open_weights(config: EngineConfig, model_dir: Path, model: ModelConfig) -> Weights:
    """The checkpoint, an adapter merged if one is to be. Raises BadCheckpoint or BadAdapter."""
    if config.merge_lora is None:
        return Checkpoint(model_dir)
    _, path = split_module("merge_lora", config.merge_lora)
    adapter = read_adapter(Path(path), model, torch.float32, max_rank=model.hidden_size)  # no slot limits it
    return MergedWeights(Checkpoint(model_dir), adapter, model)
