"""Embedding, scale and first norm in one pass, beside the torch definition.

python benchmarks/kernels/bench_embed_norm.py --tokens 1 64 4096 --hidden 2304 3584
"""

from collections.abc import Iterator

import torch
from timing import Case, arguments, report

from cabochon.kernels.embed_norm import embed_norm, embed_norm_reference
from cabochon.kernels.error_budget import assert_within_budget

EPS = 1e-6
VOCAB = 256_000


def cases(tokens: int, hidden: int, vocab: int = VOCAB, device: str = "cuda") -> Iterator[Case]:
    embedding = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16)
    ids = torch.randint(vocab, (tokens,), device=device)
    scale = float(torch.tensor(hidden**0.5, dtype=torch.bfloat16))
    weight = torch.randn(hidden, device=device) + 1
    residual = torch.empty(tokens, hidden, device=device, dtype=torch.bfloat16)
    x = torch.empty_like(residual)

    def ours() -> None:
        embed_norm(ids, embedding, scale, weight, EPS, residual_out=residual, x_out=x)

    def check() -> None:
        low = embed_norm_reference(ids, embedding, scale, weight, EPS)
        rows = embedding.index_select(0, ids).double()
        truth = embed_norm_reference(torch.arange(tokens, device=device), rows, scale, weight.double(), EPS)
        assert torch.equal(residual, low[0]), "the residual is not the definition's"
        assert_within_budget(x, low[1], truth[1])

    shape: dict[str, object] = {"T": tokens, "E": hidden}
    moved = 3 * x.nbytes + weight.nbytes
    yield Case("ours", shape, ours, check, moved)
    yield Case(
        "eager", shape, lambda: embed_norm_reference(ids, embedding, scale, weight, EPS), lambda: None, moved
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[640, 2304, 3584, 4608])
    args = parser.parse_args()
    sizes = [(tokens, hidden) for hidden in args.hidden for tokens in args.tokens]
    report("embed_norm", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
