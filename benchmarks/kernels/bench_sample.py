"""Sampling: greedy, drawn, truncated and flat rows, beside what torch would do; bytes are the logits' alone.

python benchmarks/kernels/bench_sample.py --rows 1 32 256 --vocab 256000 --vocab-tile 1024 2048 4096

`flat` has its nucleus in most of the vocabulary: the passes over whole rows. Checked against torch: greedy
rows exactly, truncated ones by membership.
"""

from collections.abc import Iterator

import torch
from timing import Case, arguments, report
from torch import Tensor

from cabochon.kernels.sample import SampleBuffers, Tiling, sample
from cabochon.kernels.sampling import truncation_threshold
from cabochon.kernels.sampling_state import RowSampling, SamplingState

CAP = 30.0
KINDS = {
    "greedy": RowSampling(temperature=0.0),
    "greedy, logprobs": RowSampling(temperature=0.0, wants_logprobs=True),
    "drawn": RowSampling(),
    "top_k 64, top_p 0.95": RowSampling(top_k=64, top_p=0.95),
    "top_p 0.9": RowSampling(top_p=0.9),
    "min_p 0.05": RowSampling(min_p=0.05),
    "flat": RowSampling(top_p=0.9, temperature=20.0),
}


def eager(logits: Tensor) -> Tensor:
    """The cap, a softmax and a draw, in fp32: temporaries of [R, V]."""
    p = (CAP * torch.tanh(logits.float() / CAP)).softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def cases(kind: str, rows: int, vocab: int, vocab_tile: int, device: str = "cuda") -> Iterator[Case]:
    logits = (torch.randn(rows, vocab, device=device) * 4).bfloat16()
    state = SamplingState(max_seqs=rows, vocab_size=vocab, max_entries=9216, allocate=torch.device(device))
    for row in range(rows):
        state.set_row(row, KINDS[kind])
    row_ids = torch.arange(rows, device=device, dtype=torch.int32)
    counts = torch.full((rows,), 100, device=device, dtype=torch.int32)
    buffers = SampleBuffers(rows, state, Tiling(vocab_tile=vocab_tile))

    def ours() -> object:
        return sample(logits, row_ids, state, counts, counts, CAP, buffers)

    def check() -> None:
        chosen, sampling = buffers.outputs.token_ids[:rows].long(), KINDS[kind]
        assert buffers.outputs.is_finite[:rows].all(), "a finite row is called infinite"
        if sampling.temperature == 0:
            assert torch.equal(chosen, logits.max(-1).indices), "not the largest logit"
            return
        for row in range(min(rows, 4)):
            scores = CAP * torch.tanh(logits[row].float() / CAP) / sampling.temperature
            least = truncation_threshold(
                scores, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
            )
            assert scores[chosen[row]] >= least - 1e-4, "a token that does not survive"

    shape: dict[str, object] = {"kind": kind, "R": rows, "V": vocab, "vocab_tile": vocab_tile}
    yield Case("ours", shape, ours, check, logits.nbytes)
    if kind == "drawn":
        yield Case("eager", shape, lambda: eager(logits), lambda: None, logits.nbytes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[256_000])
    parser.add_argument("--vocab-tile", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    sizes = [
        (kind, rows, vocab, tile)
        for kind in args.kinds
        for rows in args.rows
        for vocab in args.vocab
        for tile in args.vocab_tile
    ]
    report("sample", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
