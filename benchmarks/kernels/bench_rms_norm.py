"""RMSNorm, beside the torch definition.

python benchmarks/kernels/bench_rms_norm.py --tokens 1 64 4096 --hidden 2304 3584 4608
"""

from collections.abc import Iterator

import torch
from timing import Case, arguments, report

from cabochon.kernels import definitions
from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.rms_norm import rms_norm

EPS = 1e-6


def cases(tokens: int, hidden: int, device: str = "cuda") -> Iterator[Case]:
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    weight, out = torch.randn(hidden, device=device) + 1, torch.empty_like(x)

    def check() -> None:
        truth = definitions.rms_norm(x.double(), weight.double(), EPS)
        assert_within_budget(out, definitions.rms_norm(x, weight, EPS), truth)

    shape: dict[str, object] = {"T": tokens, "E": hidden}
    moved = 2 * out.nbytes + weight.nbytes
    yield Case("ours", shape, lambda: rms_norm(x, weight, EPS, out=out), check, moved)
    yield Case("eager", shape, lambda: definitions.rms_norm(x, weight, EPS), lambda: None, moved)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[640, 2304, 3584, 4608])
    args = parser.parse_args()
    sizes = [(tokens, hidden) for hidden in args.hidden for tokens in args.tokens]
    report("rms_norm", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
