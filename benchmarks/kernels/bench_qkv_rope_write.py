"""Rope, QK norm and the write into pages in one pass, at the heads of each model, bf16 and e4m3 pages.

python benchmarks/kernels/bench_qkv_rope_write.py --tokens 1 256 4096
"""

from collections.abc import Iterator

import torch
from timing import Case, arguments, report

from cabochon.kernels.definitions import rope_table
from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.qkv_rope_write import qkv_rope_reference, qkv_rope_write

HEADS = {"270M": (4, 1, 256), "2B": (8, 4, 256), "9B": (16, 8, 256), "27B": (32, 16, 128)}  # Hq, Hkv, D
PAGE_TOKENS = 16
MAX_LEN = 8192


def cases(model: str, tokens: int, is_fp8: bool, device: str = "cuda") -> Iterator[Case]:
    Hq, Hkv, D = HEADS[model]
    qkv = torch.randn(tokens, (Hq + 2 * Hkv) * D, device=device, dtype=torch.bfloat16)
    cos, sin = (table.to(device) for table in rope_table(MAX_LEN, D, 10_000.0))
    positions = torch.randint(MAX_LEN, (tokens,), device=device)
    num_pages = -(-tokens // PAGE_TOKENS) * 2 + 1
    slots = torch.randperm(num_pages * PAGE_TOKENS, device=device)[:tokens]
    q_out = torch.empty(tokens, Hq, D, device=device, dtype=torch.bfloat16)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    k_pages, v_pages = (
        torch.zeros(num_pages, PAGE_TOKENS, Hkv, D, device=device, dtype=dtype) for _ in range(2)
    )
    scales = [torch.zeros(num_pages, PAGE_TOKENS, Hkv, device=device) if is_fp8 else None for _ in range(2)]

    def ours() -> None:
        qkv_rope_write(
            qkv, positions, cos, sin, slots, q_out=q_out, k_pages=k_pages, v_pages=v_pages,
            k_scales=scales[0], v_scales=scales[1],
        )  # fmt: skip

    def check() -> None:
        low = qkv_rope_reference(qkv, positions, cos, sin, (Hq, Hkv))
        truth = qkv_rope_reference(qkv.double(), positions, cos.double(), sin.double(), (Hq, Hkv))
        assert_within_budget(q_out, low[0], truth[0])
        if not is_fp8:
            assert_within_budget(k_pages.flatten(0, 1)[slots], low[1], truth[1])
            assert torch.equal(v_pages.flatten(0, 1)[slots], low[2]), "values are not as they came"

    written = 2 * tokens * Hkv * (D * k_pages.itemsize + (4 if is_fp8 else 0))
    moved = qkv.nbytes + q_out.nbytes + written + tokens * D * 4
    shape: dict[str, object] = {"model": model, "T": tokens, "pages": "e4m3" if is_fp8 else "bf16"}
    yield Case("ours", shape, ours, check, moved)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 4096])
    parser.add_argument("--models", nargs="+", choices=HEADS, default=list(HEADS))
    args = parser.parse_args()
    sizes = [(model, tokens, fp8) for model in args.models for tokens in args.tokens for fp8 in (False, True)]
    report("qkv_rope_write", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
