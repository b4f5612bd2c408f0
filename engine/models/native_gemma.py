"""The fused forward pass in C on the CPU."""

from collections.abc import Sequence

from torch import Tensor

from cabochon.engine.int8_linear import Int8Head
from cabochon.engine.linear import Linear, MakeLinear
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.fused import FusedGemma, FusedKernels
from cabochon.engine.models.gemma import LoadTensor
from cabochon.engine.native_linear import NativeLinear
from cabochon.engine.screen import screen_of
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

    @staticmethod
    def load_kernels() -> FusedKernels:
        return FusedKernels(embed_norm, rms_norm, qkv_rope_write, sandwich_norm, geglu)

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
