"""The one place of matrix products with weights: packed for the CPU once, plain elsewhere.

On CPU a oneDNN-packed weight takes 11.4 ms where F.linear takes 22.2 (4 rows × 262144 × 640, bf16, 2 Zen 4
cores) and in fp32 22 ms instead of 101. The packed layout replaces the plain one; only the tied embedding is
kept beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 4  # callers pad rows to it: below, a row's bits depend on how many rows there are


class Linear:
    """x @ weightᵀ for a weight [n, k] that is given away: CPU weights are repacked."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes
        self.is_packed = weight.device.type == "cpu" and torch._C._has_mkldnn
        # Private operators, those that inductor emits for frozen CPU weights: torch's range pins them.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, k], rows a multiple of ROW_MULTIPLE on CPU. Returns [rows, n] in x's dtype."""
        if not self.is_packed:
            return F.linear(x, self._weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return out
