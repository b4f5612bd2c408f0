"""What adapters cost: throughput of streams spread over several adapters, beside the base model's.

    python benchmarks/lora.py --seqs 16 --adapters 8 --rank 16 --rounds 5 --out FILE

One engine with random adapters of all seven modules; rounds are interleaved (base, adapters, base, ...), each
with prompts never seen before; a warm-up round of each is dropped. The last row has the median ratio. Greedy,
EOS ignored, no prefix hits. Run nothing else meanwhile: absolute figures drift, ratios hold. On a GPU too:
--device cuda.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import emit, environment
from offline import DTYPES, measure, new_prompts
from safetensors.torch import save_file

from cabochon.engine.adapters.adapter import PARTS, linear_shapes
from cabochon.engine.llm import LLM
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.source import locate
from cabochon.engine.sampling_params import SamplingParams


def write_adapter(directory: Path, model: ModelConfig, rank: int, seed: int) -> None:
    """Random, in PEFT's format, small enough to leave logits finite."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.num_layers):
        for name, shape in linear_shapes(model).items():
            start = 0
            for part, end in zip(PARTS[name], shape.part_ends, strict=True):
                prefix = f"base_model.model.model.layers.{layer}.{part}"
                a = torch.randn((rank, shape.k), generator=g) * shape.k**-0.5
                tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = (
                    torch.randn((end - start, rank), generator=g).mul_(0.01).bfloat16()
                )
                start = end
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    modules = [part.partition(".")[2] for parts in PARTS.values() for part in parts]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    args = parse_args()
    shape = {name: getattr(args, name) for name in ("model", "dtype", "seqs", "adapters", "rank")}
    shape |= {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens, "device": args.device}
    row = {**shape, **environment()}
    with tempfile.TemporaryDirectory() as folder:
        model = load_model_config(locate(args.model))
        modules = []
        for index in range(args.adapters):
            write_adapter(Path(folder) / f"a{index}", model, args.rank, index)
            modules.append(f"a{index}={folder}/a{index}")
        llm = LLM(
            args.model, dtype=args.dtype, device=args.device, threads=args.threads,
            lora_modules=tuple(modules),
            max_loras=args.adapters, max_lora_rank=args.rank, kv_cache_gib=args.kv_cache_gib,
        )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
    names = {
        "base": [None] * args.seqs,
        "adapters": [f"a{index % args.adapters}" for index in range(args.seqs)],
    }
    rates: dict[str, list[float]] = {kind: [] for kind in names}
    rng = np.random.default_rng(0)
    for number in range(args.rounds + 1):
        for kind, adapters in names.items():

            def run(prompts: list[list[int]], _: int, adapters: list[str | None] = adapters) -> int:
                return sum(len(one.token_ids) for one in llm.generate(prompts, params, adapter=adapters))

            rate = measure(run, new_prompts(rng, args), args.output_tokens)
            if number:  # round 0 warms up
                rates[kind].append(rate)
                emit({"kind": kind, "round": number, "output_tok_per_s": round(rate, 1), **row}, args.out)
    pairs = [with_them / base for base, with_them in zip(rates["base"], rates["adapters"], strict=True)]
    medians = {kind: round(statistics.median(values), 1) for kind, values in rates.items()}
    summary: dict[str, object] = {"summary": "median output tok/s", **medians, **row}
    summary |= {
        "ratio": round(statistics.median(pairs), 3),
        "ratio_min_max": [round(min(pairs), 3), round(max(pairs), 3)],
    }
    emit(summary, args.out)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a directory or a Hub id")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--kv-cache-gib", type=float, default=1.0)
    p.add_argument("--seqs", type=int, default=16)
    p.add_argument("--adapters", type=int, default=8)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
