"""LoRA on top of the models' linear layers, rows shared evenly by adapters, beside torch's loop over them.

    python benchmarks/kernels/bench_lora.py --tokens 1 256 --adapters 1 32 --rank 16

bytes: A and B of the adapters in use, up to their rank (adapter_bytes), x, and out read and written.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from timing import Case, arguments, report
from torch import Tensor

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.lora import add_lora, scratch_words
from cabochon.kernels.lora_definition import TILE_ROWS, LoraWeights, add_lora_reference, lora_tiles

LAYERS: dict[str, tuple[int, tuple[int, ...]]] = {  # K, part_ends
    "270M qkv": (640, (1024, 1280, 1536)),
    "2B qkv": (2304, (2048, 3072, 4096)),
    "9B qkv": (3584, (4096, 6144, 8192)),
    "9B o": (4096, (3584,)),
    "9B gate_up": (3584, (14336, 28672)),
    "9B down": (14336, (3584,)),
}
MAX_RANK = 64
MAX_DECODES = 256  # more rows are a prefill's


def make_weights(layer: str, adapters: int, rank: int, device: str) -> LoraWeights:
    """Slots of MAX_RANK, NaN beyond the rank."""
    K, part_ends = LAYERS[layer]
    options = {"device": device, "dtype": torch.bfloat16}
    a = torch.full((adapters, len(part_ends), MAX_RANK, K), torch.nan, **options)
    b = torch.full((adapters, part_ends[-1], MAX_RANK), torch.nan, **options)
    a[:, :, :rank] = torch.randn(a[:, :, :rank].shape, **options) * K**-0.5
    b[:, :, :rank] = torch.randn(b[:, :, :rank].shape, **options) * rank**-0.5
    ranks = torch.full((adapters,), rank, device=device, dtype=torch.int32)
    return LoraWeights(a.flatten(1, 2), b, ranks, part_ends)


def add_in_a_loop(x: Tensor, weights: LoraWeights, lens: list[int], rank: int, out: Tensor) -> None:
    """One adapter after the other: two products a part. lens: rows of each."""
    first = 0
    for slot, rows in enumerate(lens):
        begin = 0
        for part, end in enumerate(weights.part_ends):
            a = weights.a[slot, part * MAX_RANK : part * MAX_RANK + rank]
            low = x[first : first + rows] @ a.t()
            out[first : first + rows, begin:end].addmm_(low, weights.b[slot, begin:end, :rank].t())
            begin = end
        first += rows


def cases(layer: str, tokens: int, adapters: int, rank: int, device: str = "cuda") -> Iterator[Case]:
    K, part_ends = LAYERS[layer]
    x = torch.randn(tokens, K, device=device, dtype=torch.bfloat16)
    before = torch.randn(tokens, part_ends[-1], device=device, dtype=torch.bfloat16)
    out, loop_out = before.clone(), before.clone()  # each run adds to it: the check is of the first
    weights = make_weights(layer, adapters, rank, device)
    lens = [len(rows) for rows in np.array_split(np.arange(tokens), adapters)]
    tile_rows = TILE_ROWS[tokens > MAX_DECODES]
    slots = np.arange(adapters, dtype=np.int32)
    tiles = torch.from_numpy(lora_tiles(slots, np.array(lens, dtype=np.int32), tile_rows)).to(device)
    scratch = torch.empty(scratch_words(tokens, len(part_ends), MAX_RANK), device=device)

    def check(out: Tensor) -> None:
        low, truth = before.clone(), before.double()
        add_lora_reference(x, weights, tiles, out=low)
        a, b, *rest = weights
        add_lora_reference(x.double(), LoraWeights(a.double(), b.double(), *rest), tiles, out=truth)
        assert_within_budget(out, low, truth)

    def ours() -> None:
        add_lora(x, weights, tiles, tile_rows=tile_rows, scratch=scratch, out=out)

    used = sum(rows > 0 for rows in lens)
    adapter_bytes = used * rank * (len(part_ends) * K + part_ends[-1]) * x.itemsize
    shape: dict[str, object] = {
        "layer": layer, "T": tokens, "adapters": adapters, "rank": rank, "adapter_bytes": adapter_bytes,
    }  # fmt: skip
    moved = adapter_bytes + x.nbytes + 2 * out.nbytes
    yield Case("ours", shape, ours, partial(check, out), moved)
    loop = partial(add_in_a_loop, x, weights, lens, rank, loop_out)
    yield Case("eager", shape, loop, partial(check, loop_out), moved)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256, 4096])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    args = parser.parse_args()
    sizes = [
        (layer, tokens, adapters, rank)
        for layer in args.layers
        for tokens in args.tokens
        for adapters in args.adapters
        for rank in args.rank
        if adapters <= tokens
    ]
    report("lora", (case for size in sizes for case in cases(*size)), args)


if __name__ == "__main__":
    main()
