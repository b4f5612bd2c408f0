"""A LoRA adapter as the engine has it: for each of a layer's four linear layers, two small matrices.

The model's q, k and v are one linear layer of three parts, gate and up one of two. An adapter's matrices are
stacked alike, so that adding it takes two products for each linear layer and not for each part.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from cabochon.engine.models.config import ModelConfig

LinearName = Literal["qkv", "out", "gate_up", "down"]
PARTS: dict[LinearName, tuple[str, ...]] = {  # names as in checkpoints, within a layer
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class LinearShape(NamedTuple):
    """k inputs; part i makes outputs part_ends[i - 1] to part_ends[i]."""

    k: int
    part_ends: tuple[int, ...]

    @property
    def n(self) -> int:
        """All outputs."""
        return self.part_ends[-1]


class Delta(NamedTuple):
    """What an adapter adds to a linear layer of P parts: b @ (a @ x), part by part, its scale within b.

    a: [P · r, k], part after part, r the rank of the whole adapter. b: [n, r]. Where a part has less rank, or
    is not adapted at all, rows of a and columns of b are zero.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Weights in the working dtype, in host memory. layers[i] lacks linear layers that it leaves alone."""

    rank: int
    layers: list[dict[LinearName, Delta]]
    base_model: str | None  # as its configuration has it

    @property
    def num_bytes(self) -> int:
        """Of all its weights."""
        return sum(t.nbytes for layer in self.layers for delta in layer.values() for t in delta)


def linear_shapes(model: ModelConfig) -> dict[LinearName, LinearShape]:
    """Of every layer."""
    E, F = model.hidden_size, model.mlp_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": LinearShape(E, (q, q + kv, q + 2 * kv)),
        "out": LinearShape(q, (E,)),
        "gate_up": LinearShape(E, (F, 2 * F)),
        "down": LinearShape(F, (E,)),
    }


def slot_bytes(model: ModelConfig, rank: int, itemsize: int) -> int:
    """Of an adapter of that rank on every module: its own at most, and what a slot on a GPU takes."""
    sizes = [len(PARTS[name]) * shape.k + shape.n for name, shape in linear_shapes(model).items()]
    return model.num_layers * rank * sum(sizes) * itemsize
