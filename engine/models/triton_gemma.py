"""The fused forward pass on Triton's kernels."""

from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.fused import FusedGemma, FusedKernels
from cabochon.kernels.embed_norm import embed_norm
from cabochon.kernels.geglu import geglu
from cabochon.kernels.qkv_rope_write import qkv_rope_write
from cabochon.kernels.rms_norm import MAX_ROW, rms_norm
from cabochon.kernels.sandwich_norm import sandwich_norm

SMALLEST_HEAD_DIM = 16  # of a product of tensor cores


def can_fuse(config: ModelConfig) -> bool:
    """Whether the kernels take the model: heads of a power of two, rows that fit a tile."""
    D = config.head_dim
    return D >= SMALLEST_HEAD_DIM and D & (D - 1) == 0 and config.hidden_size <= MAX_ROW


class TritonGemma(FusedGemma):
    """For TritonAttention; a CUDA graph may hold it."""

    is_graph_safe = True

    @staticmethod
    def load_kernels() -> FusedKernels:
        return FusedKernels(embed_norm, rms_norm, qkv_rope_write, sandwich_norm, geglu)
