"""Rows to e4m3 with a scale each, at the hidden and MLP sizes of the models, beside the torch definition.

python benchmarks/kernels/bench_quantize_rows.py --tokens 1 64 4096 --sizes 2304 9216 14336
"""

from collections.abc import Iterator

import torch
from timing import Case, arguments, report

from cabochon.kernels import definitions
from cabochon.kernels.quantize_rows import quantize_rows


def cases(tokens: int, row_len: int, device: str = "cuda") -> Iterator[Case]:
    x = torch.randn(tokens, row_len, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, row_len, device=device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(tokens, device=device)

    def check() -> None:
        values, expected = definitions.quantize_rows(x)
        assert torch.equal(scales, expected), "scales are not the definition's"
        assert torch.equal(out.view(torch.uint8), values.view(torch.uint8)), "bits are not the definition's"

    shape: dict[str, object] = {"T": tokens, "K": row_len}
    moved = x.nbytes + out.nbytes + scales.nbytes
    yield Case("ours", shape, lambda: quantize_rows(x, out=out, scales=scales), check, moved)
    yield Case("eager", shape, lambda: definitions.quantize_rows(x), lambda: None, moved)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 4096])
    parser.add_argument("--sizes", type=int, nargs="+", default=[640, 2304, 3584, 4608, 9216, 14336, 36864])
    args = parser.parse_args()
    sizes = [(tokens, row_len) for row_len in args.sizes for tokens in args.tokens]
    report("quantize_rows", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
