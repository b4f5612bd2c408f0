"""Matrix products with weights: packed for the CPU once, plain elsewhere, or in fp8; int8: int8_linear.py.

On CPU a oneDNN-packed weight takes 11.4 ms where F.linear takes 22.2 (4 rows × 262144 × 640, bf16, 2 Zen 4
cores) and in fp32 22 ms instead of 101. The packed layout replaces the plain one; only the tied embedding is
kept beside it.
"""

import importlib.util
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cabochon.engine.errors import ConfigError
from cabochon.kernels import definitions

ROW_MULTIPLE = 4  # callers pad rows to it on a CPU: below, a row's bits depend on how many rows there are
FP8_MULTIPLE = 16  # torch._scaled_mm on CUDA takes no other n and k
QUANTIZED_ROWS = 1024  # of a weight at once: 1024 × 36864 in fp32 are 151 MB


class Linear:
    """x @ weightᵀ for a weight [n, k] that is given away: CPU weights are repacked."""

    row_multiple = ROW_MULTIPLE

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes
        self.is_packed = weight.device.type == "cpu" and torch._C._has_mkldnn
        self.is_copy = self.is_packed  # of the weight: who keeps that has both
        # Private operators, those that inductor emits for frozen CPU weights: torch's range pins them.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, k], rows a multiple of ROW_MULTIPLE on CPU. Returns [rows, n] in x's dtype."""
        if not self.is_packed:
            return F.linear(x, self._weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return out

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor:
        """Single entries of the product, not rounded.

        x: [C, k]. weight_rows: [C, k], rows of the weight. Returns [C] fp32.
        """
        return exact_entries(x, weight_rows)


class Fp8Linear:
    """An approximation of `Linear`: weight and x rounded to e4m3, a scale per row of each, sums in fp32.

    A weight's scales are set once, those of x by every call. On a CPU the same numbers are multiplied in the
    working dtype by `Linear`: torch._scaled_mm has a CPU kernel, but it takes 1.8 s where this takes 19 ms
    (4 rows × 262144 × 640, one Zen 4 core). So there it saves no memory, and in bf16 it rounds twice.
    """

    row_multiple = ROW_MULTIPLE

    def __init__(self, weight: Tensor) -> None:
        """weight: [n, k], left as it is. Raises ConfigError if k is not a multiple of 16."""
        self.out_features, self.in_features = weight.shape
        if self.in_features % FP8_MULTIPLE:
            raise ConfigError(
                f"quantization must be none for a weight whose rows are no multiple of {FP8_MULTIPLE} long,"
                f" got fp8 and {self.in_features}: use none"
            )
        self.is_copy = True
        self._quantize = _row_quantizer(weight.device)
        is_emulated = weight.device.type == "cpu" and torch._C._has_mkldnn
        if is_emulated:
            values, self._scales = _quantized_weight(weight, weight.dtype, self.out_features)
        else:
            padded = self.out_features + -self.out_features % FP8_MULTIPLE
            values, self._scales = _quantized_weight(weight, torch.float8_e4m3fn, padded)
        self.num_bytes = values.nbytes + self._scales.nbytes
        self._weight = Linear(values) if is_emulated else values  # else [padded, k]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, k], rows a multiple of ROW_MULTIPLE on CPU. Returns [rows, n] in x's dtype.

        NaN or infinity in a row of x makes all of that row so.
        """
        values, scales = self._quantize(x)  # [rows, k] e4m3, [rows] fp32
        if isinstance(self._weight, Linear):
            out = self._weight(values.to(x.dtype)).float()
            return out.mul_(scales[:, None]).mul_(self._scales).to(x.dtype)
        # Row-major by column-major, scales [rows, 1] and [1, n] fp32, is all that CUDA takes. Fast
        # accumulation keeps fewer bits of the sums: not used before its loss and its gain are measured.
        out = torch._scaled_mm(
            values,
            self._weight.t(),
            scale_a=scales[:, None],
            scale_b=self._scales,
            out_dtype=x.dtype,
            use_fast_accum=False,
        )
        return out[:, : self.out_features]

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor:
        """As Linear's, of the quantized product. weight_rows: of the weight as it was given."""
        (a, a_scales), (b, b_scales) = map(definitions.quantize_rows, (x, weight_rows))
        return (a.float() * b.float()).sum(-1) * a_scales * b_scales


class AnyLinear(Protocol):
    """`Linear`, or an approximation of it."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def is_copy(self) -> bool: ...

    @property
    def row_multiple(self) -> int:
        """Callers pad rows to it."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor: ...


MakeLinear = Callable[[Tensor], AnyLinear]  # weight [n, k] -> its product


def exact_entries(x: Tensor, weight_rows: Tensor) -> Tensor:
    """[C, k] and [C, k] to their products [C] in fp32."""
    return (x.float() * weight_rows.float()).sum(-1)


def _quantized_weight(weight: Tensor, dtype: torch.dtype, num_rows: int) -> tuple[Tensor, Tensor]:
    """Values [num_rows, k] as dtype, scales [1, num_rows] fp32; past n 0. In pieces: little memory."""
    n, k = weight.shape
    values = torch.zeros((num_rows, k), dtype=dtype, device=weight.device)
    scales = torch.ones((1, num_rows), device=weight.device)
    for start in range(0, n, QUANTIZED_ROWS):
        end = min(start + QUANTIZED_ROWS, n)
        some, scales[0, start:end] = definitions.quantize_rows(weight[start:end])
        values[start:end] = some.to(dtype)
    return values, scales


def _row_quantizer(device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """One kernel where Triton can run; else the definition, which is half a dozen."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return definitions.quantize_rows
    from cabochon.kernels.quantize_rows import quantize_rows  # triton is optional

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(len(x), device=x.device)
        quantize_rows(x, out=out, scales=scales)
        return out, scales

    return quantize
