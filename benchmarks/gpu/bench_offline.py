"""Offline throughput beside transformers' continuous batching, both with 2B's shape and the same weights.

    python benchmarks/gpu/bench_offline.py --seqs 32 --prompt-tokens 128 --output-tokens 64

Rounds are interleaved in one process, prompts new in each; a warm-up round of each is dropped. Greedy,
EOS ignored, no prefix hits. The last row has the median ratio.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
import transformers
from cases import OPTIONS, Row, arguments, run_cases
from device_rates import environment
from random_engine import generate, make_core, random_prompts, sync
from random_weights import configuration, oracle
from transformers import GenerationConfig

from cabochon.engine.sampling_params import SamplingParams

FAST = {"cuda_graphs": True, "step_depth": 2}
MAX_BATCH_TOKENS = 4096  # as ours
Run = Callable[[list[list[int]]], int]  # prompts -> output tokens made


def ours(args: Any) -> Run:
    options = {name: value for name, value in FAST.items() if name in OPTIONS and args.device == "cuda"}
    core, *_ = make_core(
        configuration(args.size), args.device, "bf16", max_seqs=args.seqs,
        max_tokens=args.prompt_tokens + args.output_tokens + 1, step_tokens=MAX_BATCH_TOKENS, **options,
    )  # fmt: skip
    params = [SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)] * args.seqs
    return lambda prompts: sum(map(len, generate(core, prompts, params)))


def generate_batch(args: Any) -> Run:
    """With eager attention: transformers gives its Gemma 2 no other without flash-attn."""
    model = oracle(configuration(args.size), torch.bfloat16, torch.device(args.device))
    config = GenerationConfig(max_new_tokens=args.output_tokens, do_sample=False, eos_token_id=-1)
    options = {"generation_config": config, "progress_bar": False, **batching(args)}
    if "persistent_manager" in signature(model.generate_batch).parameters:
        options["persistent_manager"] = True  # else its graphs are captured in every round

    def run(prompts: list[list[int]]) -> int:
        outputs = model.generate_batch(inputs=prompts, **options)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return run


def batching(args: Any) -> dict[str, object]:
    """Room for all requests, twice: its own choice is all of memory, and a mask of as many columns."""
    make = getattr(transformers, "ContinuousBatchingConfig", None)  # younger than the oldest we take
    if make is None:
        return {}
    config = make(max_batch_tokens=max(args.seqs, MAX_BATCH_TOKENS))
    page = getattr(config, "page_size", None) or getattr(config, "block_size", None) or 32
    config.num_blocks = 4 * args.seqs * -(-(args.prompt_tokens + args.output_tokens) // page)
    return {"continuous_batching_config": config}


PROVIDERS: dict[str, Callable[[Any], Run]] = {"cabochon": ours, "transformers generate_batch": generate_batch}


def offline(args: Any) -> Iterator[Row]:
    """Rows of all rounds, then the summary; a provider that fails leaves the other's rows."""
    shape: Row = {"size": args.size, "seqs": args.seqs, "prompt_tokens": args.prompt_tokens}
    shape |= {"output_tokens": args.output_tokens, **environment(args.device)}
    runs: dict[str, Run] = {}
    rates: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    vocab = configuration(args.size).vocab_size
    for number in range(args.rounds + 1):
        for name, make in PROVIDERS.items():
            if number and name not in runs:
                continue
            prompts = random_prompts(
                vocab, [args.prompt_tokens] * args.seqs, seed=2 * number + len(rates[name])
            )
            try:
                runs[name] = runs[name] if number else make(args)
                sync(args.device)
                started_s = time.perf_counter()
                made = runs[name](prompts)
                rate = made / (time.perf_counter() - started_s)
            except Exception as error:  # theirs may not run here at all
                runs.pop(name, None)
                if name == "cabochon":
                    raise
                yield {"provider": name, "error": type(error).__name__, "message": str(error)[:500], **shape}
                continue
            assert made == args.seqs * args.output_tokens, f"{name} made {made} tokens"
            if number:
                rates[name].append(rate)
                yield {"provider": name, "round": number, "output_tok_per_s": rate, **shape}
    yield {"summary": "median output tok/s", **_summary(rates), **shape}


def _summary(rates: dict[str, list[float]]) -> Row:
    row: Row = {name: statistics.median(values) for name, values in rates.items() if values}
    if all(rates.values()):
        pairs = [a / b for a, b in zip(*rates.values(), strict=False)]
        row |= {"ratio": statistics.median(pairs), "ratio_min": min(pairs), "ratio_max": max(pairs)}
    return row


def main() -> int:
    p = arguments(__doc__)
    p.add_argument("--size", choices=["2b", "9b", "tiny"], default="2b")
    p.add_argument("--seqs", type=int, default=32)
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    if args.tiny:
        args.size, args.seqs, args.prompt_tokens, args.output_tokens, args.rounds = "tiny", 2, 10, 4, 1
    return run_cases([("offline", lambda: offline(args))])


if __name__ == "__main__":
    sys.exit(main())
