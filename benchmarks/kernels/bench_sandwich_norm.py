"""Post-norm, residual add and pre-norm in one pass, beside the torch definition.

python benchmarks/kernels/bench_sandwich_norm.py --tokens 1 64 4096 --hidden 2304 3584 4608
"""

from collections.abc import Iterator

import torch
from timing import Case, arguments, report

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.sandwich_norm import sandwich_norm, sandwich_norm_reference

EPS = 1e-6


def cases(tokens: int, hidden: int, device: str = "cuda") -> Iterator[Case]:
    branch, residual = torch.randn(2, tokens, hidden, device=device, dtype=torch.bfloat16)
    post, pre = torch.randn(2, hidden, device=device) + 1
    total, x = torch.empty_like(branch), torch.empty_like(branch)

    def check() -> None:
        low = sandwich_norm_reference(branch, residual, post, pre, EPS)
        wide = [tensor.double() for tensor in (branch, residual, post, pre)]
        truth = sandwich_norm_reference(*wide, EPS)
        assert_within_budget(total, low[0], truth[0])
        assert_within_budget(x, low[1], truth[1])

    def ours() -> None:
        sandwich_norm(branch, residual, post, pre, EPS, residual_out=total, x_out=x)

    shape: dict[str, object] = {"T": tokens, "E": hidden}
    moved = 4 * branch.nbytes + 2 * post.nbytes
    yield Case("ours", shape, ours, check, moved)
    yield Case(
        "eager", shape, lambda: sandwich_norm_reference(branch, residual, post, pre, EPS), lambda: None, moved
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[640, 2304, 3584, 4608])
    args = parser.parse_args()
    sizes = [(tokens, hidden) for hidden in args.hidden for tokens in args.tokens]
    report("sandwich_norm", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
