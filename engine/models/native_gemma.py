"""The fused forward pass in C on the CPU. Products stay torch's: oneDNN knows every instruction for them."""

from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.fused import FusedGemma, FusedKernels
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


def can_run_native(config: ModelConfig) -> bool:
    """Whether the library is there and takes the model: rows and heads of whole vectors."""
    sizes = (config.hidden_size, config.mlp_size, config.head_dim)
    fits = all(size % LANES == 0 for size in sizes) and config.head_dim <= MAX_HEAD_DIM
    return fits and library() is not None


class NativeGemma(FusedGemma):
    """For NativeAttention."""

    @staticmethod
    def load_kernels() -> FusedKernels:
        return FusedKernels(embed_norm, rms_norm, qkv_rope_write, sandwich_norm, geglu)
