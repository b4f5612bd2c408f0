"""Products with weights in int8 on a CPU: half the bytes to read and to keep, multiplied in C.

A weight has a scale per row (symmetric, −127 to 127), and so has x, in 16 bits: with 8 the demo's divergence
is ten times as large (docs/numerics.md). The head computes again, from the embedding, what could be the
largest.
"""

from torch import Tensor

from cabochon.engine.errors import ConfigError
from cabochon.engine.linear import exact_entries
from cabochon.kernels.native.forward import Weight
from cabochon.kernels.native.int8 import FEWEST, int8_head, int8_linear
from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.quantize import quantization_errors, quantize_weight

SUM_ROUNDINGS = 32  # of an fp32 sum, beside one for each vector of a row: trees, scales, conversions


class Int8Linear:
    """Nearly x @ weightᵀ: the weight in 8 bits, x in 16."""

    is_copy = True
    row_multiple = 1

    def __init__(self, weight: Tensor) -> None:
        """weight: [n, k], left as it is. Raises ConfigError for shapes that the kernel does not take."""
        self.out_features, self.in_features = weight.shape
        _check_shape(weight)
        self.weight = Weight(*quantize_weight(weight))
        self.num_bytes = sum(part.nbytes for part in self.weight if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, k]. Returns [rows, n] in x's dtype; not finite where a row of x is not in one element."""
        out = x.new_empty((len(x), self.out_features))
        values, scales = self.weight
        assert scales is not None
        int8_linear(x.contiguous(), values, scales, out=out)
        return out

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor:
        """As Linear's, of the quantized weight. weight_rows: of the weight as it was given."""
        values, scales = quantize_weight(weight_rows)
        return exact_entries(x, values[:, : self.in_features]) * scales


class Int8Head:
    """The tied head: every entry approximate, but for those that could be the largest of their row.

    |x·w − x̂·ŵ| ≤ ‖x‖ ‖w − ŵ‖ + ‖x − x̂‖ ‖ŵ‖, to which the rounding of sums and results is added. Whose upper
    bound reaches the lower bound of a row's largest is computed from the embedding. So the largest entry is
    the unquantized product's, and greedy tokens without bias, penalties and masks are.
    """

    is_copy = True
    row_multiple = 1

    def __init__(self, embedding: Tensor) -> None:
        """embedding: [V, E], kept. Raises ConfigError for shapes that the kernel does not take."""
        _check_shape(embedding)
        self.out_features, self.in_features = embedding.shape
        self._embedding = embedding
        self._values, self._scales = quantize_weight(embedding)
        errors, self._largest = error_bounds(embedding, self._values, self._scales)
        # Of sums in fp32, relative to the product of norms.
        sum_error = (self.in_features / LANES + SUM_ROUNDINGS) * 2.0**-24
        self._errors = errors.add_(sum_error * self._largest)
        self.num_bytes = self._values.nbytes + self._scales.nbytes + self._errors.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x: [R, E]. Returns [R, V] in x's dtype."""
        out = x.new_empty((len(x), self.out_features))
        weight = self._values, self._scales, self._embedding, self._errors, self._largest
        int8_head(x.contiguous(), *weight, out=out)
        return out

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor:
        """Linear's: there is no int8 in it."""
        return exact_entries(x, weight_rows)


def _check_shape(weight: Tensor) -> None:
    n, k = weight.shape
    if n < FEWEST or k % LANES:
        raise ConfigError(
            f"quantization must be none for a weight of fewer than {FEWEST} rows or whose rows are no"
            f" multiple of {LANES} long, got int8 and {n} × {k}: use none"
        )


def error_bounds(weight: Tensor, values: Tensor, scales: Tensor) -> tuple[Tensor, float]:
    """At least ‖w − ŵ‖ of every row, and the largest ‖w‖ or ‖ŵ‖.

    weight: [n, k]. values, scales: of quantize_weight. Returns [n] fp32, not finite where the weight is not.
    """
    errors, norms = quantization_errors(weight, values, scales)
    largest = float((norms + errors).max())  # of ‖w‖ too
    return errors.mul_(1.0001), largest * 1.0001  # roundings of themselves
