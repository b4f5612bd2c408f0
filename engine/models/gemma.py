"""The forward pass of Gemma 2 and Gemma 3 (text), packed over sequences: tokens in, hidden rows, logits out.

One decoder for both: they differ in softcaps, QK norm, layer pattern and rope bases, all in ModelConfig.
Rounding follows transformers' modeling_gemma2/3: norms in fp32 rounded once, residual added in the working
dtype, gelu rounded before its product; but RoPE is in fp32 and rounded once. Knows nothing of requests,
pages' owners or sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.engine.adapters.adapter import LinearName
from cabochon.engine.adapters.deltas import StepDeltas
from cabochon.engine.attention import Attention, AttentionInputs
from cabochon.engine.linear import AnyLinear, Fp8Linear, Linear, MakeLinear
from cabochon.engine.models.config import ModelConfig
from cabochon.kernels.definitions import geglu, rms_norm, rope, rope_table
from cabochon.kernels.native.sampling import Slack
from cabochon.kernels.sampling import Draw

LoadTensor = Callable[[str, tuple[int, ...]], Tensor]  # name, expected shape -> tensor in the working dtype


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor  # [E], 1 + w, like every norm here
    post_attention_norm: Tensor
    pre_mlp_norm: Tensor
    post_mlp_norm: Tensor
    q_norm: Tensor | None  # [D], Gemma 3
    k_norm: Tensor | None
    qkv: AnyLinear  # [(Hq + 2 Hkv) D, E]
    out: AnyLinear  # [E, Hq D]
    gate_up: AnyLinear  # [2 F, E]
    down: AnyLinear  # [E, F]
    is_sliding: bool


class LayerLinears:
    """A layer's linear layers in one step, adapters included. [T', k] to [T', n] each."""

    def __init__(self, layer_idx: int, layer: _Layer, deltas: StepDeltas | None) -> None:
        self.layer_idx = layer_idx
        self._layer = layer
        self._deltas = deltas

    def qkv(self, x: Tensor) -> Tensor:
        return self._apply("qkv", self._layer.qkv, x)

    def out(self, x: Tensor) -> Tensor:
        return self._apply("out", self._layer.out, x)

    def gate_up(self, x: Tensor) -> Tensor:
        return self._apply("gate_up", self._layer.gate_up, x)

    def down(self, x: Tensor) -> Tensor:
        return self._apply("down", self._layer.down, x)

    def _apply(self, name: LinearName, linear: AnyLinear, x: Tensor) -> Tensor:
        out = linear(x)
        if self._deltas is not None:
            self._deltas.add(self.layer_idx, name, x, out)
        return out


class Gemma:
    """Weights and forward pass. Names are those of transformers' checkpoints."""

    is_graph_safe = False  # whether a CUDA graph may hold `hidden` with padding among its sequences

    def __init__(
        self,
        config: ModelConfig,
        load: LoadTensor,
        max_model_len: int,
        make_linear: MakeLinear = Linear,
        make_head: MakeLinear | None = None,
    ) -> None:
        """Take every weight once through `load`, layer by layer, packing or quantizing as it goes.

        make_head: from the embedding, which is kept; None: make_linear.
        """
        self.config = config
        D = config.head_dim
        embedding = load("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._embedding = embedding  # [V, E]
        # √E rounded to the weights' dtype: 59.75 for 9B in bf16, as the checkpoints were trained
        self._embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=embedding.dtype).to(
            embedding.device
        )
        self._layers = [_load_layer(config, load, make_linear, layer) for layer in range(config.num_layers)]
        self._final_norm = _norm(load, "model.norm.weight", config.hidden_size)
        self._head = (make_head or make_linear)(embedding)  # tied; its packed or quantized form is a copy
        kinds = {
            True: (config.rope_theta_sliding, 1.0),
            False: (config.rope_theta_global, config.rope_factor_global),
        }
        self._rope = {
            kind: _angles(rope_table(max_model_len, D, theta, factor), embedding.device)
            for kind, (theta, factor) in kinds.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, a packed or quantized head beside the embedding counted."""
        linears = [
            linear.num_bytes
            for layer in self._layers
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        head = self._head.num_bytes if self._head.is_copy else 0  # else it is the embedding itself
        return self._embedding.nbytes + head + sum(linears)

    def hidden(
        self,
        token_ids: Tensor,
        inputs: AttentionInputs,
        attention: Attention[Any],
        deltas: StepDeltas | None = None,
    ) -> Tensor:
        """Hidden rows before the final norm.

        token_ids: [T'] int64, T' a multiple of row_multiple ≥ the tokens of `inputs`. deltas: of their
        adapters.
        Returns [T', E].
        """
        x = self._embedding.index_select(0, token_ids) * self._embedding_scale  # [T', E]
        positions = torch.nn.functional.pad(inputs.positions, (0, len(token_ids) - len(inputs.positions)))
        angles = {
            kind: (cos.index_select(0, positions), sin.index_select(0, positions))
            for kind, (cos, sin) in self._rope.items()
        }
        for index, layer in enumerate(self._layers):
            linears = LayerLinears(index, layer, deltas)
            x = self._forward_layer(linears, layer, x, angles[layer.is_sliding], inputs, attention)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R', E], R' a multiple of row_multiple. Returns [R', V] in its dtype, not softcapped."""
        return self.head(self.normed(hidden))

    def head(self, normed: Tensor) -> Tensor:
        """normed: [R', E], after the final norm. Returns [R', V]."""
        return self._head(normed)

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm. hidden: [R, E]."""
        return rms_norm(hidden, self._final_norm, self.config.norm_eps)

    @property
    def row_multiple(self) -> int:
        """On a CPU, rows of `hidden` and `logits` are padded to it."""
        first = self._layers[0]
        linears = (self._head, first.qkv, first.out, first.gate_up, first.down)
        return max(linear.row_multiple for linear in linears)

    @property
    def has_quantized_head(self) -> bool:
        """Whether `exact_logits` are another model's than the embedding's."""
        return isinstance(self._head, Fp8Linear)

    @property
    def embedding(self) -> Tensor:
        """[V, E], the head's weight too."""
        return self._embedding

    def exact_logits(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Uncapped logits of some (row, token) pairs. hidden: [C, E]. token_ids: [C]. Returns [C] fp32."""
        # The head's own product before rounding, an fp8 head's too: ties are made by its values, and the
        # unquantized embedding would choose among them, and fill in log probabilities, by another model.
        return self._head.exact(self.normed(hidden), self._embedding.index_select(0, token_ids))

    def next_tokens(self, hidden: Tensor, draws: Sequence[Draw | None]) -> list[int | None] | None:
        """The likeliest token of each row, or that of its draw, found without logits. hidden: [R, E].

        None where that cannot be had, for all or for single rows: look at their logits then.
        """
        return None

    def slack(self, hidden: Tensor) -> Slack | None:
        """How far rounded logits may be from those of `next_tokens`; None: never mind. hidden: [R, E]."""
        return None

    def _forward_layer(
        self,
        linears: LayerLinears,
        layer: _Layer,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        inputs: AttentionInputs,
        attention: Attention[Any],
    ) -> Tensor:
        eps = self.config.norm_eps
        normed = rms_norm(x, layer.input_norm, eps)
        branch = self._attention(linears, layer, normed, angles, inputs, attention)
        x = x + rms_norm(branch, layer.post_attention_norm, eps)
        branch = linears.down(geglu(linears.gate_up(rms_norm(x, layer.pre_mlp_norm, eps))))
        return x + rms_norm(branch, layer.post_mlp_norm, eps)

    def _attention(
        self,
        linears: LayerLinears,
        layer: _Layer,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        inputs: AttentionInputs,
        attention: Attention[Any],
    ) -> Tensor:
        config = self.config
        heads = linears.qkv(x).view(len(x), -1, config.head_dim)  # [T', Hq + 2 Hkv, D]
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, config.norm_eps)
            k = rms_norm(k, layer.k_norm, config.norm_eps)
        out = attention.attend(linears.layer_idx, rope(q, *angles), rope(k, *angles), v, inputs)
        return linears.out(out.reshape(len(x), -1))


def _norm(load: LoadTensor, name: str, size: int) -> Tensor:
    return load(name, (size,)).float() + 1  # fp32: bf16(1 + w) loses a small w


def _angles(tables: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = tables
    return cos.to(device), sin.to(device)


def _load_layer(config: ModelConfig, load: LoadTensor, make_linear: MakeLinear, index: int) -> _Layer:
    prefix = f"model.layers.{index}."
    E, D, F = config.hidden_size, config.head_dim, config.mlp_size
    q_size, kv_size = config.num_heads * D, config.num_kv_heads * D

    def linear(*parts: tuple[str, int], k: int) -> AnyLinear:
        weights = [load(f"{prefix}{name}.weight", (n, k)) for name, n in parts]
        return make_linear(torch.cat(weights) if len(weights) > 1 else weights[0])

    def norm(name: str, size: int = E) -> Tensor:
        return _norm(load, f"{prefix}{name}.weight", size)

    return _Layer(
        input_norm=norm("input_layernorm"),
        post_attention_norm=norm("post_attention_layernorm"),
        pre_mlp_norm=norm("pre_feedforward_layernorm"),
        post_mlp_norm=norm("post_feedforward_layernorm"),
        q_norm=norm("self_attn.q_norm", D) if config.has_qk_norm else None,
        k_norm=norm("self_attn.k_norm", D) if config.has_qk_norm else None,
        qkv=linear(
            ("self_attn.q_proj", q_size), ("self_attn.k_proj", kv_size), ("self_attn.v_proj", kv_size), k=E
        ),
        out=linear(("self_attn.o_proj", E), k=q_size),
        gate_up=linear(("mlp.gate_proj", F), ("mlp.up_proj", F), k=E),
        down=linear(("mlp.down_proj", E), k=F),
        is_sliding=config.is_sliding[index],
    )
