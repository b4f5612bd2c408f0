"""Prefill alone: prompt tokens per second, and the share of what the bf16 product allows.

    python benchmarks/gpu/bench_prefill.py --size 9b --seqs 8 --prompt-tokens 1024

From handing over the prompts to the first token of the last one, prompts new in each round. The floor: the
products with every weight but the embedding's, the visible pairs of attention, the head for one row of each.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial

from attention_problem import visible_pairs
from cases import OPTIONS, Case, Row, arguments, run_cases
from device_rates import environment, floor_ms, rates
from random_engine import generate, make_core, random_prompts, sync
from random_weights import configuration
from transformers import Gemma2Config

from cabochon.engine.messages import EngineInfo
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.sampling_params import SamplingParams

STEP_TOKENS = 8192
FAST = {"cuda_graphs": True, "step_depth": 2}


def prefill_flops(model: ModelConfig, info: EngineInfo, seqs: int, length: int, itemsize: int) -> float:
    """Multiplications and additions of `seqs` prompts of that length, each with one row of logits."""
    head = model.vocab_size * model.hidden_size
    matrices = info.weight_bytes / itemsize - head
    pairs = sum(
        visible_pairs(length, length, model.window if is_sliding else None) for is_sliding in model.is_sliding
    )
    return seqs * (2 * matrices * length + 2 * head + 4 * model.num_heads * model.head_dim * pairs)


def prefill(config: Gemma2Config, seqs: int, length: int, *, device: str, rounds: int) -> Iterator[Row]:
    """One row: median over rounds."""
    options = {name: value for name, value in FAST.items() if name in OPTIONS and device == "cuda"}
    core, info, model, _ = make_core(
        config, device, "bf16", max_seqs=seqs, max_tokens=length + 2, step_tokens=STEP_TOKENS, **options
    )
    measured = rates(device)
    params = [SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)] * seqs
    times = []
    for number in range(rounds + 1):
        prompts = random_prompts(model.vocab_size, [length] * seqs, seed=number)
        sync(device)
        started_s = time.perf_counter()
        tokens = generate(core, prompts, params)
        times.append(time.perf_counter() - started_s)
        assert [len(one) for one in tokens] == [1] * seqs, "every prompt must give its first token"
    times = times[1:]  # the first compiles
    floor = floor_ms(info.weight_bytes, prefill_flops(model, info, seqs, length, 2), measured)
    seconds = statistics.median(times)
    yield {
        "seqs": seqs, "prompt_tokens": length, "tok_per_s": seqs * length / seconds, "ms": 1000 * seconds,
        "ms_min": 1000 * min(times), "ms_max": 1000 * max(times), "rounds": rounds, "floor_ms": floor,
        "share_of_roofline": floor / 1000 / seconds, "attention_backend": info.attention_backend,
        **measured._asdict(),
    }  # fmt: skip


def all_cases(args: argparse.Namespace) -> Iterator[Case]:
    config, env = configuration(args.size), environment(args.device)

    def one() -> Iterator[Row]:
        for row in prefill(config, args.seqs, args.prompt_tokens, device=args.device, rounds=args.rounds):
            yield {"size": args.size, **row, **env}

    yield f"prefill {args.size} {args.seqs} x {args.prompt_tokens}", partial(one)


def main() -> int:
    p = arguments(__doc__)
    p.add_argument("--size", choices=["2b", "9b", "27b", "tiny"], default="9b")
    p.add_argument("--seqs", type=int, default=8)
    p.add_argument("--prompt-tokens", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    if args.tiny:
        args.size, args.seqs, args.prompt_tokens = "tiny", 2, 40
    return run_cases(all_cases(args))


if __name__ == "__main__":
    sys.exit(main())
