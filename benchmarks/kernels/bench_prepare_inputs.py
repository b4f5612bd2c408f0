"""Preparing a decode step on the device: bytes are few, so the time itself is what counts.

python benchmarks/kernels/bench_prepare_inputs.py --seqs 1 64 256 --context 1024 8192
"""

from collections.abc import Iterator

import torch
from timing import Case, arguments, report

from cabochon.kernels.prepare_inputs import decode_inputs, prepare_decodes, prepare_decodes_reference

MAX_LEN = 8192
PAGE_TOKENS = 16
GROUPS = 2


def cases(seqs: int, context: int, device: str = "cuda") -> Iterator[Case]:
    row_ids = torch.randperm(seqs, device=device).int()
    token_ids = torch.randint(256_000, (seqs, MAX_LEN), device=device, dtype=torch.int32)
    num_tokens = torch.full((seqs,), context, device=device, dtype=torch.int32)
    tables = torch.randint(
        1, 10_000, (GROUPS, seqs, MAX_LEN // PAGE_TOKENS), device=device, dtype=torch.int32
    )
    out = decode_inputs(seqs, GROUPS, MAX_LEN // PAGE_TOKENS, torch.device(device))

    def check() -> None:
        expected = prepare_decodes_reference(row_ids, token_ids, num_tokens, tables, PAGE_TOKENS)
        for ours, theirs in zip(out[:4], expected[:4], strict=True):
            assert torch.equal(ours, theirs), "the inputs are not the definition's"

    def ours() -> None:
        prepare_decodes(row_ids, token_ids, num_tokens, tables, PAGE_TOKENS, out=out)

    moved = seqs * GROUPS * (2 * 4 * -(-context // PAGE_TOKENS) + 40)
    yield Case("ours", {"S": seqs, "context": context}, ours, check, moved)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192])
    args = parser.parse_args()
    sizes = [(seqs, context) for seqs in args.seqs for context in args.context]
    report("prepare_inputs", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
