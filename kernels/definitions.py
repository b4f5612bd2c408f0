"""The small operators of a Gemma layer, as torch defines them: the CPU path, and the GPU kernels' oracle.

Each computes in fp32 (or fp64 when given it) and rounds once at the end. Every row's result is bitwise the
same in any batch: only operators whose result for an element does not depend on its place in the tensor are
used. On x86 torch's rsqrt, sigmoid and gelu are not among them (their vector loops and scalar tails differ in
the last bit); sqrt, division, exp and tanh are (tests/kernels/test_definitions.py shows both).
"""

import math

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_ROW = 1e-12  # e4m3 rows below have its scale: never 0, and x / s stays finite
GELU_TILE_ROWS = 64  # keeps the fp32 temporaries of F = 2048 in a core's L2 cache


def rms_norm(x: Tensor, unit_offset_weight: Tensor, eps: float) -> Tensor:
    """Normalize each row: x · (mean(x²) + eps)^-½ · (1 + w).

    x: [..., E]. unit_offset_weight: [E] fp32 (or fp64), already 1 + w: adding in bf16 would lose a small w.
    Returns [..., E] in x's dtype.
    """
    wide = x.to(unit_offset_weight.dtype)
    scale = torch.sqrt(wide.square().mean(-1, keepdim=True).add_(eps)).reciprocal_()
    return (wide * scale).mul_(unit_offset_weight).to(x.dtype)


def rope_table(max_len: int, head_dim: int, theta: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin: two [max_len, D / 2] fp32 tables. `factor` divides positions (linear scaling)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angle = torch.arange(max_len, dtype=torch.float32)[:, None] * (1.0 / (theta**exponent) / factor)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head (NeoX layout) by the angle of its position.

    x: [T, H, D]. cos, sin: [T, D / 2] fp32, rows of `rope_table` at the tokens' positions.
    Returns [T, H, D] in x's dtype.
    """
    low, high = x.to(cos.dtype).chunk(2, dim=-1)  # each [T, H, D / 2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up, gelu with tanh, rounded to x's dtype before the product as transformers does.

    gate_up: [T, 2 F], gate first. Returns [T, F].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    activated = torch.cat([_gelu(tile) for tile in torch.split(gate, GELU_TILE_ROWS)]) if len(gate) else gate
    return activated * up


def _gelu(gate: Tensor) -> Tensor:
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    root = math.sqrt(2 / math.pi)
    inner = x.square().mul_(0.044715 * root).add_(root).mul_(x)
    return inner.tanh_().add_(1).mul_(x).mul_(0.5).to(gate.dtype)


def softcap_(scores: Tensor, cap: float) -> Tensor:
    """cap · tanh(scores / cap), in place."""
    return scores.div_(cap).tanh_().mul_(cap)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to e4m3 after division by its scale, max |x| / 448.

    x: [..., K]. Returns e4m3 [..., K] and scales [...] fp32. NaN or infinity in a row makes its scale so.
    """
    wide = x.float()
    largest = wide.abs().amax(-1).clamp_(min=SMALLEST_ROW)
    scales = largest / torch.full_like(largest, E4M3_MAX)  # CUDA would multiply by a number's reciprocal
    return (wide / scales[..., None]).to(torch.float8_e4m3fn), scales
