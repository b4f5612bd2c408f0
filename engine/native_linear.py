"""Products in bf16 in C, where the CPU has the instruction and no tiles: the same for a row in any batch."""

from torch import Tensor

from cabochon.engine.linear import AnyLinear, Linear, exact_entries
from cabochon.kernels.native.forward import Weight
from cabochon.kernels.native.linear import can_multiply, fits, linear, pack


def native_linear(weight: Tensor) -> AnyLinear:
    """The faster product for this CPU and weight [n, k], which is given away: this one, or oneDNN's."""
    return NativeLinear(weight) if fits(weight) and can_multiply() else Linear(weight)


class NativeLinear:
    """x @ weightᵀ, as `Linear`."""

    is_copy = True
    row_multiple = 1

    def __init__(self, weight: Tensor) -> None:
        """weight: [n, k] bf16, multiples of 16. Raises ValueError if it is not."""
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes
        self.weight = Weight(pack(weight))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, k] bf16. Returns [rows, n]."""
        out = x.new_empty((len(x), self.out_features))
        linear(x.contiguous(), self.weight.values, out=out)
        return out

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor:
        """As Linear's."""
        return exact_entries(x, weight_rows)
