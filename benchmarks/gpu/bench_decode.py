"""Decode alone, KV filled beforehand: output tokens per second, and the share of what the copy rate allows.

    python benchmarks/gpu/bench_decode.py --size 2b --seqs 1 64 256 --context 1024

Every sequence is prefilled by the engine; then whole steps are timed on the host, in rounds. The floor of
a step: weights and visible K and V read once, or the products done, at the rates measured in this run. A
row is one (sequences, variant): median step over rounds, lowest and highest. Greedy, EOS ignored.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
from cases import OPTIONS, Case, Row, arguments, need_options, run_cases
from device_rates import environment, floor_ms, rates
from gpu_rates import Rates
from random_engine import add, key_bytes, make_core, random_prompts, step, sync, visible_keys
from random_weights import configuration
from transformers import Gemma2Config

from cabochon.engine.core import EngineCore
from cabochon.engine.messages import EngineInfo
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.sampling_params import SamplingParams

FAST = {"cuda_graphs": True, "step_depth": 2}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {"cuda_graphs": False, "step_depth": 1},
    "graphs": {"cuda_graphs": True, "step_depth": 1},
    "fast": FAST,
    "fast, fp8 KV": {**FAST, "kv_dtype": "fp8"},
    "fast, fp8 weights": {**FAST, "quantization": "fp8"},
}
OPTIONAL = frozenset(FAST)  # an engine without them has what `plain` asks for
STEP_TOKENS = 4096


class Sequences:
    """All in decode, each with its length so far."""

    def __init__(self, core: EngineCore, prompts: list[list[int]], max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self._core = core
        self._lens = {add(core, prompt, params): len(prompt) for prompt in prompts}
        started = set[str]()
        while len(started) < len(prompts):
            started |= {output.request_id for output in self._step()}

    @property
    def lens(self) -> np.ndarray:
        """[S] int64."""
        return np.array(list(self._lens.values()), np.int64)

    def run(self, steps: int) -> tuple[float, int]:
        """Returns seconds and tokens of that many steps."""
        before = int(self.lens.sum())
        started_s = time.perf_counter()
        for _ in range(steps):
            self._step()
        return time.perf_counter() - started_s, int(self.lens.sum()) - before

    def _step(self) -> list:
        outputs = step(self._core)
        for output in outputs:
            assert output.finish_reason is None, "a sequence ended while it was timed"
            self._lens[output.request_id] += len(output.token_ids)
        return outputs

    def end(self) -> None:
        """Abort all."""
        for name in self._lens:
            self._core.abort(name)


def decode_floor_ms(
    model: ModelConfig, info: EngineInfo, lens: np.ndarray, measured: Rates, itemsize: int
) -> float:
    """Of a step with one token for each sequence of these lengths."""
    keys = visible_keys(model, lens)
    flops = 2 * info.weight_bytes / itemsize * len(lens) + 4 * model.num_heads * model.head_dim * keys
    return floor_ms(info.weight_bytes + keys * key_bytes(model, itemsize), flops, measured)


def options_of(variant: str) -> dict[str, object]:
    """Of the engine. Raises Absent if it lacks what makes the variant."""
    wanted = VARIANTS[variant]
    if variant == "plain":
        return {name: value for name, value in wanted.items() if name in OPTIONS}
    if not OPTIONAL & OPTIONS:
        if set(wanted) == OPTIONAL:
            need_options(*wanted)
        wanted = {name: value for name, value in wanted.items() if name not in OPTIONAL}
    need_options(*wanted)
    return wanted


def decode(
    config: Gemma2Config, seqs: int, context: int, variant: str, *, device: str, steps: int, rounds: int
) -> Iterator[Row]:
    """The row of one variant."""
    options = options_of(variant)
    margin = 5 * seqs * context // (4 * STEP_TOKENS) + 8  # the first decode while the last are prefilled
    tokens = margin + (rounds + 1) * steps + 8
    core, info, model, num_graphs = make_core(
        config, device, "bf16", max_seqs=seqs, max_tokens=context + tokens, step_tokens=STEP_TOKENS, **options
    )
    measured = rates(device)
    prompts = random_prompts(model.vocab_size, [context] * seqs)
    sequences = Sequences(core, prompts, tokens)
    sequences.run(steps)  # warm-up: kernels are compiled, graphs captured
    sync(device)
    times, floors = [], []
    for _ in range(rounds):
        seconds, count = sequences.run(steps)
        times.append(1000 * seconds * seqs / count)  # per token of each, however many steps are in flight
        floors.append(decode_floor_ms(model, info, sequences.lens - steps // 2, measured, 2))
    keys_mean = float(sequences.lens.mean())
    sequences.end()
    row: Row = {
        "seqs": seqs, "context": context, "keys_mean": keys_mean, "variant": variant,
        "num_graphs": num_graphs,
        "tok_per_s": 1000 * seqs / statistics.median(times), "step_ms": statistics.median(times),
        "step_ms_min": min(times), "step_ms_max": max(times), "rounds": rounds, "steps": steps,
        "weight_bytes": info.weight_bytes, "attention_backend": info.attention_backend,
    }  # fmt: skip
    if "fp8" not in variant:  # a floor of mixed widths would flatter
        share = statistics.median(floor / ms for floor, ms in zip(floors, times, strict=True))
        row |= {"floor_ms": statistics.median(floors), "share_of_roofline": share}
    yield {**row, **measured._asdict()}


def all_cases(args: argparse.Namespace) -> Iterator[Case]:
    config = configuration(args.size)
    env = environment(args.device)

    def one(seqs: int, variant: str) -> Iterator[Row]:
        for row in decode(
            config, seqs, args.context, variant, device=args.device, steps=args.steps, rounds=args.rounds
        ):
            yield {"size": args.size, **row, **env}

    for seqs in args.seqs:
        for variant in args.variants:
            yield f"decode {args.size} S={seqs} {variant}", partial(one, seqs, variant)


def main() -> int:
    p = arguments(__doc__)
    p.add_argument("--size", choices=["2b", "9b", "27b", "tiny"], default="2b")
    p.add_argument("--seqs", type=int, nargs="+", default=[1, 64, 256])
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--steps", type=int, default=8, help="steps of a round")
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    if args.tiny:
        args.size, args.seqs, args.context, args.steps = "tiny", [1, 4], 40, 2
    return run_cases(all_cases(args))


if __name__ == "__main__":
    sys.exit(main())
