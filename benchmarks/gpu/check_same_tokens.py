"""Options that must not change a token: CUDA graphs beside eager steps, two steps in flight beside one.

    python benchmarks/gpu/check_same_tokens.py

2B's shape with four layers; requests of other lengths that end at other steps, half of them sampled. In
fp32 (TF32 off) all tokens must be equal. In bf16 cuBLAS may round another batch size differently: the
share is reported.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from cases import Case, Row, arguments, need_options, run_cases
from device_rates import environment
from random_engine import generate, make_core, random_prompts
from random_weights import configuration
from transformers import Gemma2Config

from cabochon.engine.sampling_params import SamplingParams

LAYERS = 4
LENGTHS = (1, 5, 16, 17, 33, 64, 90, 128, 200, 301, 511, 700)
MAX_TOKENS = (64, 3, 40, 1, 17, 64, 33, 8, 50, 2, 64, 29)
PAIRS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "graphs equal eager": ({"cuda_graphs": False}, {"cuda_graphs": True}),
    "depth 2 equals depth 1": ({"step_depth": 1}, {"step_depth": 2}),
    "both equal neither": (
        {"cuda_graphs": False, "step_depth": 1},
        {"cuda_graphs": True, "step_depth": 2},
    ),
}


def sampling(count: int) -> list[SamplingParams]:
    """Every second one greedy, the others with their seeds."""
    return [
        SamplingParams(
            temperature=index % 2, seed=index, top_p=0.9 if index % 4 == 1 else 1.0, max_tokens=length,
            ignore_eos=True,
        )
        for index, length in enumerate(MAX_TOKENS[:count])
    ]  # fmt: skip


def compare(
    config: Gemma2Config, lengths: tuple[int, ...], pair: str, dtype: str, device: str
) -> Iterator[Row]:
    """Runs the same requests under both."""
    one, other = PAIRS[pair]
    need_options(*one)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    prompts = random_prompts(config.vocab_size, lengths)
    results = []
    for options in (one, other):
        core, _, _, num_graphs = make_core(
            config, device, dtype, max_seqs=8, max_tokens=max(lengths) + max(MAX_TOKENS) + 1,
            step_tokens=256, **options,
        )  # fmt: skip
        if device == "cuda" and "cuda_graphs" in options:
            assert (num_graphs > 0) is options["cuda_graphs"], f"{num_graphs} graphs were captured: {options}"
        results.append(generate(core, prompts, sampling(len(prompts))))
    assert [len(a) for a in results[0]] == [len(b) for b in results[1]], "outputs differ in length"
    pairs = [(a, b) for x, y in zip(*results, strict=True) for a, b in zip(x, y, strict=True)]
    same = sum(a == b for a, b in pairs)
    yield {"pair": pair, "dtype": dtype, "equal_tokens": same, "tokens": len(pairs)}
    assert dtype == "bf16" or same == len(pairs), f"{same} of {len(pairs)} tokens are equal: {pair}"


def main() -> int:
    args = arguments(__doc__).parse_args()
    size, lengths = ("tiny", LENGTHS[:4]) if args.tiny else ("2b", LENGTHS)
    config, env = configuration(size, num_hidden_layers=LAYERS), environment(args.device)

    def one(pair: str, dtype: str) -> Iterator[Row]:
        for row in compare(config, lengths, pair, dtype, args.device):
            yield {"size": size, **row, **env}

    cases: list[Case] = [
        (f"{pair}, {dtype}", partial(one, pair, dtype)) for pair in PAIRS for dtype in ("fp32", "bf16")
    ]
    return run_cases(cases)


if __name__ == "__main__":
    sys.exit(main())
