"""Gemma's forward pass on fused kernels, Triton's or C's: one launch between two GEMMs.

Per layer: QKV product · norm, rope and page write · attention · out product · sandwich norm · gate and up
product · GeGLU · down product · sandwich norm, the last with the next layer's input norm in it. Rounds where
Gemma rounds. Asks the device for nothing and takes no shape from data, so a CUDA graph may hold it whole.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.engine.adapters.deltas import StepDeltas
from cabochon.engine.attention import Attention, AttentionInputs
from cabochon.engine.linear import Linear, MakeLinear
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.gemma import Gemma, LayerLinears, LoadTensor
from cabochon.engine.pages_attention import PagesAttention, PagesInputs


class FusedKernels(NamedTuple):
    """What stands between the products. Arguments: kernels/embed_norm.py and those of the other names."""

    embed_norm: Callable[..., None]
    rms_norm: Callable[..., None]
    qkv_rope_write: Callable[..., None]
    sandwich_norm: Callable[..., None]
    geglu: Callable[..., None]


class _Step(NamedTuple):
    """Buffers of one step, which all layers use in turn: what a layer leaves there the next overwrites."""

    positions: Tensor  # [T'] int64, 0 for padding
    slots: list[Tensor]  # per group [T'] int64, −1 for padding
    residual: Tensor  # [T', E]
    x: Tensor  # [T', E], what the next product takes
    q: Tensor  # [T', Hq, D]
    attended: Tensor  # [T', Hq, D]; padding is zero from the start: no sequence has it, so no layer writes it
    gated: Tensor  # [T', F]


class FusedGemma(Gemma, ABC):
    """Gemma with the same weights, for attention through page tables."""

    def __init__(
        self,
        config: ModelConfig,
        load: LoadTensor,
        max_model_len: int,
        make_linear: MakeLinear = Linear,
        make_head: MakeLinear | None = None,
    ) -> None:
        super().__init__(config, load, max_model_len, make_linear, make_head)
        self._kernels = self.load_kernels()
        self._host_scale = self._embedding_scale.item()  # here, where waiting for the device costs nothing

    @staticmethod
    @abstractmethod
    def load_kernels() -> FusedKernels:
        """Those of the device."""

    def hidden(
        self,
        token_ids: Tensor,
        inputs: AttentionInputs,
        attention: Attention[Any],
        deltas: StepDeltas | None = None,
    ) -> Tensor:
        """Hidden rows before the final norm.

        token_ids: [T'] int64, T' ≥ the tokens of `inputs`; what is beyond them, or has the slot −1, is
        padding and writes no K and V. Returns [T', E].
        """
        assert isinstance(attention, PagesAttention)
        assert isinstance(inputs, PagesInputs)
        eps, layers = self.config.norm_eps, self._layers
        step = self._step(len(token_ids), inputs)
        self._kernels.embed_norm(
            token_ids, self._embedding, self._host_scale, layers[0].input_norm, eps,
            residual_out=step.residual, x_out=step.x,
        )  # fmt: skip
        following = [*(layer.input_norm for layer in layers[1:]), None]  # the final norm is for chosen rows
        for index, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
            linears = LayerLinears(index, layer, deltas)
            branch = self._attend(linears, step, inputs, attention)  # [T', E]
            self._end_branch(branch, layer.post_attention_norm, layer.pre_mlp_norm, eps, step)
            self._kernels.geglu(linears.gate_up(step.x), out=step.gated)
            self._end_branch(linears.down(step.gated), layer.post_mlp_norm, next_norm, eps, step)
        return step.residual

    def _step(self, num_rows: int, inputs: PagesInputs) -> _Step:
        config, embedding = self.config, self._embedding
        heads = (num_rows, config.num_heads, config.head_dim)
        residual = embedding.new_empty((num_rows, config.hidden_size))
        return _Step(
            positions=padded([inputs.positions], num_rows, 0)[0],
            slots=padded(inputs.slots, num_rows, -1),
            residual=residual,
            x=torch.empty_like(residual),
            q=embedding.new_empty(heads),
            attended=embedding.new_zeros(heads),
            gated=embedding.new_empty((num_rows, config.mlp_size)),
        )

    def _attend(
        self, linears: LayerLinears, step: _Step, inputs: PagesInputs, attention: PagesAttention
    ) -> Tensor:
        layer, pages = self._layers[linears.layer_idx], attention.pages_of(linears.layer_idx)
        cos, sin = self._rope[layer.is_sliding]
        self._kernels.qkv_rope_write(
            linears.qkv(step.x), step.positions, cos, sin, step.slots[pages.group],
            q_out=step.q, k_pages=pages.k, v_pages=pages.v, k_scales=pages.k_scales, v_scales=pages.v_scales,
            q_norm=layer.q_norm, k_norm=layer.k_norm, eps=self.config.norm_eps,
        )  # fmt: skip
        out = attention.attend_pages(linears.layer_idx, step.q, inputs, out=step.attended)
        return linears.out(out.flatten(1))

    def _end_branch(
        self, branch: Tensor, post_norm: Tensor, next_norm: Tensor | None, eps: float, step: _Step
    ) -> None:
        """Add the normalized branch to the residual; the norm of that is the next branch's input."""
        self._kernels.sandwich_norm(
            branch, step.residual, post_norm, next_norm, eps,
            residual_out=step.residual, x_out=None if next_norm is None else step.x,
        )  # fmt: skip

    def normed(self, hidden: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        self._kernels.rms_norm(hidden, self._final_norm, self.config.norm_eps, out=out)
        return out


def padded(tensors: Sequence[Tensor], num_rows: int, value: int) -> list[Tensor]:
    """Vectors, each with as many `value` behind it as num_rows lacks."""
    return [pad(x, (0, num_rows - len(x)), value=value) if len(x) < num_rows else x for x in tensors]
