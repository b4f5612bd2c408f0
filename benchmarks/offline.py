"""Offline throughput of the engine, beside transformers' continuous batching on the same weights.

    python benchmarks/offline.py --seqs 16 --prompt-tokens 128 --output-tokens 64 --rounds 5 --out FILE

Rounds are interleaved (ours, theirs, ours, ...) in one process, each with prompts never seen before; a
warm-up round of each is dropped. A row is one round: output tokens per second. The last row has the median
ratio. Greedy, EOS ignored, no prefix hits. Run nothing else meanwhile: absolute figures drift with the
machine, ratios hold.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import emit, environment
from transformers import AutoModelForCausalLM, GenerationConfig

from cabochon.engine.llm import LLM
from cabochon.engine.models.source import locate
from cabochon.engine.sampling_params import SamplingParams

Prompts = list[list[int]]
Provider = Callable[[Prompts, int], int]  # prompts, output tokens each -> output tokens made
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ours(args: argparse.Namespace) -> Provider:
    llm = LLM(args.model, dtype=args.dtype, kv_cache_gib=1.0, threads=args.threads)

    def run(prompts: Prompts, output_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        return sum(len(completion.token_ids) for completion in llm.generate(prompts, params))

    return run


def generate_batch(args: argparse.Namespace) -> Provider:
    model = AutoModelForCausalLM.from_pretrained(locate(args.model), dtype=DTYPES[args.dtype]).eval()

    def run(prompts: Prompts, output_tokens: int) -> int:
        config = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1)
        outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return run


PROVIDERS: dict[str, Callable[[argparse.Namespace], Provider]] = {
    "cabochon": ours,
    "transformers generate_batch": generate_batch,
}


def new_prompts(rng: np.random.Generator, args: argparse.Namespace) -> Prompts:
    return [rng.integers(1000, 200_000, args.prompt_tokens).tolist() for _ in range(args.seqs)]


def measure(run: Provider, prompts: Prompts, output_tokens: int) -> float:
    """Output tokens per second, prefill included."""
    started_s = time.perf_counter()
    made = run(prompts, output_tokens)
    assert made == len(prompts) * output_tokens, f"{made} tokens: every request must give all of its output"
    return made / (time.perf_counter() - started_s)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    shape = {"model": args.model, "dtype": args.dtype, "seqs": args.seqs}
    shape |= {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
    env = environment()
    providers = {name: PROVIDERS[name](args) for name in args.providers}
    rates: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(args.rounds + 1):
        for name, run in providers.items():
            rate = measure(run, new_prompts(rng, args), args.output_tokens)
            if number:  # round 0 warms up
                rates[name].append(rate)
                emit(
                    {"provider": name, "round": number, "output_tok_per_s": round(rate, 1), **shape, **env},
                    args.out,
                )
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    summary: dict[str, object] = {"summary": "median output tok/s", **medians, **shape, **env}
    if len(rates) == 2:
        pairs = [a / b for a, b in zip(*rates.values(), strict=True)]
        summary["ratio"] = round(statistics.median(pairs), 2)
        summary["ratio_min_max"] = [round(min(pairs), 2), round(max(pairs), 2)]
    emit(summary, args.out)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a directory or a Hub id")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--seqs", type=int, default=16)
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
