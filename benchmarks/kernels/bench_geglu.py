"""gelu_tanh(gate) · up, beside torch.

python benchmarks/kernels/bench_geglu.py --tokens 1 64 4096 --mlp 9216 14336 36864
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timing import Case, arguments, report
from torch import Tensor

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.geglu import geglu


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def cases(tokens: int, mlp: int, device: str = "cuda") -> Iterator[Case]:
    gate_up = torch.randn(tokens, 2 * mlp, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, mlp, device=device, dtype=torch.bfloat16)

    def check() -> None:
        assert_within_budget(out, eager(gate_up), eager(gate_up.double()))

    shape: dict[str, object] = {"T": tokens, "F": mlp}
    moved = gate_up.nbytes + out.nbytes
    yield Case("ours", shape, lambda: geglu(gate_up, out=out), check, moved)
    yield Case("eager", shape, lambda: eager(gate_up), lambda: None, moved)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 4096])
    parser.add_argument("--mlp", type=int, nargs="+", default=[2048, 9216, 14336, 36864])
    args = parser.parse_args()
    sizes = [(tokens, mlp) for mlp in args.mlp for tokens in args.tokens]
    report("geglu", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
