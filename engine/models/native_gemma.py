"""The fused forward pass in C on the CPU."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cabochon.engine.adapters.deltas import StepDeltas
from cabochon.engine.attention import Attention, AttentionInputs
from cabochon.engine.int8_linear import Int8Head, Int8Linear
from cabochon.engine.linear import AnyLinear, Linear, MakeLinear
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.fused import FusedGemma, FusedKernels, padded
from cabochon.engine.models.gemma import LoadTensor
from cabochon.engine.native_attention import NativeAttention
from cabochon.engine.native_linear import NativeLinear
from cabochon.engine.pages_attention import PagesInputs
from cabochon.engine.screen import screen_of
from cabochon.kernels.native.forward import Forward, LayerTensors, Sizes, Weight
from cabochon.kernels.native.layers import (
    LANES,
    MAX_HEAD_DIM,
    embed_norm,
    geglu,
    qkv_rope_write,
    rms_norm,
    sandwich_norm,
)
from cabochon.kernels.native.library import library
from cabochon.kernels.native.sampling import Slack
from cabochon.kernels.sampling import Draw


def can_run_native(config: ModelConfig) -> bool:
    """Whether the library is there and takes the model: rows and heads of whole vectors."""
    sizes = (config.hidden_size, config.mlp_size, config.head_dim)
    fits = all(size % LANES == 0 for size in sizes) and config.head_dim <= MAX_HEAD_DIM
    return fits and library() is not None


class NativeGemma(FusedGemma):
    """For NativeAttention."""

    def __init__(
        self,
        config: ModelConfig,
        load: LoadTensor,
        max_model_len: int,
        make_linear: MakeLinear = Linear,
        make_head: MakeLinear | None = None,
    ) -> None:
        super().__init__(config, load, max_model_len, make_linear, make_head)
        is_known = isinstance(self._head, Linear | NativeLinear | Int8Head)  # an fp8 head is another model's
        self._screen = screen_of(self._embedding) if is_known else None
        self._forward: tuple[NativeAttention, Forward] | None = None  # of the attention that came last
        weights = [_weights_of((layer.qkv, layer.out, layer.gate_up, layer.down)) for layer in self._layers]
        self._weights = [four for four in weights if four is not None]  # or fewer than layers: single calls

    @staticmethod
    def load_kernels() -> FusedKernels:
        return FusedKernels(embed_norm, rms_norm, qkv_rope_write, sandwich_norm, geglu)

    def hidden(
        self,
        token_ids: Tensor,
        inputs: AttentionInputs,
        attention: Attention[Any],
        deltas: StepDeltas | None = None,
    ) -> Tensor:
        """As FusedGemma's, in one call of C without adapters and where the weights are C's."""
        if deltas is not None or len(self._weights) < len(self._layers):
            return super().hidden(token_ids, inputs, attention, deltas)
        assert isinstance(inputs, PagesInputs)
        assert isinstance(attention, NativeAttention)
        if self._forward is None or self._forward[0] is not attention:
            self._forward = attention, self._forward_over(attention)
        return self._forward[1](
            token_ids,
            padded([inputs.positions], len(token_ids), 0)[0],
            padded(inputs.slots, len(token_ids), -1),
            inputs.page_tables,
            inputs.cu_seqlens_q,
            inputs.seq_lens,
        )

    def _forward_over(self, attention: NativeAttention) -> Forward:
        config = self.config
        sizes = Sizes(
            hidden=config.hidden_size,
            mlp=config.mlp_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.norm_eps,
            attention_scale=config.attention_scale,
            softcap=config.attention_softcap,
        )
        layers = []
        for index, (layer, weights) in enumerate(zip(self._layers, self._weights, strict=True)):
            pages = attention.pages_of(index)
            q_norm, k_norm = layer.q_norm, layer.k_norm
            layers.append(
                LayerTensors(
                    norms=(
                        layer.input_norm,
                        layer.post_attention_norm,
                        layer.pre_mlp_norm,
                        layer.post_mlp_norm,
                    ),
                    head_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
                    weights=weights,
                    angles=self._rope[layer.is_sliding],
                    pages=(pages.k, pages.v),
                    group=pages.group,
                    window=attention.windows[pages.group],
                )
            )
        return Forward(self._embedding, self._host_scale, sizes, layers)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + (self._screen.num_bytes if self._screen else 0)

    def next_tokens(self, hidden: Tensor, draws: Sequence[Draw | None]) -> list[int | None] | None:
        is_drawn = any(draw is not None for draw in draws)
        if self._screen is None or (is_drawn and not self._has_exact_logits):
            return None
        return self._screen(self.normed(hidden), draws, self.config.final_softcap)

    def slack(self, hidden: Tensor) -> Slack | None:
        if self._screen is None or not self._has_exact_logits:
            return None
        return self._screen.slack(self.normed(hidden))

    @property
    def _has_exact_logits(self) -> bool:
        """But for rounding. In int8 only the largest are, and draws are from what the head makes of all."""
        return isinstance(self._head, Linear | NativeLinear)

    def exact_logits(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        if self._screen is None:
            return super().exact_logits(hidden, token_ids)
        return self._screen.exact(self.normed(hidden), self._embedding.index_select(0, token_ids))


def _weights_of(linears: Sequence[AnyLinear]) -> tuple[Weight, Weight, Weight, Weight] | None:
    """What C multiplies with, or None where another library does."""
    known = [linear.weight for linear in linears if isinstance(linear, NativeLinear | Int8Linear)]
    if len(known) < len(linears):
        return None
    qkv, out, gate_up, down = known
    return qkv, out, gate_up, down
