"""Latency of the engine alone, without a server: time to first token by prompt length, a step by batch.

    python benchmarks/latency.py --prompts 32 128 512 2048 --batches 1 4 16 --rounds 5 --out FILE

ttft: one request on an idle engine, from `add` to the step that gives its first token. step: what a token
costs while that many requests decode together, the median of the steps in which all of them do. Rounds run
every case once, one after the other, with prompts never seen before; a warm-up round is dropped. Greedy, EOS
ignored. The last rows have the median of each case over rounds, and its lowest and highest. Two backends
(`--backends auto torch`) take turns within each case: then rows have the ratio too, how often the first is as
fast as the second.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
from machine import emit, environment

from cabochon.engine.llm import LLM
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams

Case = tuple[str, int]  # ttft and tokens of the prompt, or step and requests of the batch


class Bench:
    """An engine and prompts that it has never seen."""

    def __init__(self, llm: LLM, args: argparse.Namespace) -> None:
        self._core = llm.core
        self._args = args
        self._rng = np.random.default_rng(0)
        self._count = 0

    def measure(self, case: Case) -> float:
        """Milliseconds. A short prompt before wakes what has slept while another engine had its turn."""
        self._ttft_ms(16)
        name, size = case
        return self._ttft_ms(size) if name == "ttft" else self._step_ms(size)

    def _add(self, prompt_tokens: int, output_tokens: int) -> None:
        self._count += 1
        low = min(1000, self._args.top_id // 2)  # control tokens stand at a vocabulary's beginning
        ids = self._rng.integers(low, self._args.top_id, prompt_tokens).tolist()
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        self._core.add(GenerateRequest(request_id=f"{self._count}", prompt_ids=ids, params=params))

    def _ttft_ms(self, prompt_tokens: int) -> float:
        started_s = time.perf_counter()
        self._add(prompt_tokens, 1)
        while not any(output.token_ids for output in self._core.step()[0]):
            pass
        return (time.perf_counter() - started_s) * 1000

    def _step_ms(self, batch: int) -> float:
        for _ in range(batch):
            self._add(self._args.prompt_tokens, self._args.output_tokens)
        steps_ms = []
        while self._core.has_work:
            started_s = time.perf_counter()
            outputs, _ = self._core.step()
            step_ms = (time.perf_counter() - started_s) * 1000
            if self._core.stats().step_tokens == batch == len(outputs):
                steps_ms.append(step_ms)
        assert steps_ms, "no step had all of the batch: raise --output-tokens or max_seqs"
        return statistics.median(steps_ms)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    llms = [
        LLM(
            args.model, dtype=args.dtype, device=args.device, kv_cache_gib=args.kv_cache_gib,
            threads=args.threads, attention_backend=backend,
        )
        for backend in args.backends
    ]  # fmt: skip
    benches = {llm.info.attention_backend: Bench(llm, args) for llm in llms}
    about: dict[str, object] = {
        "model": args.model,
        "dtype": args.dtype,
        "device": args.device,
        "threads": args.threads,
        "benchmark": "latency",
        **environment(),
    }
    cases = [*(("ttft", size) for size in args.prompts), *(("step", size) for size in args.batches)]
    found: dict[tuple[Case, str], list[float]] = {(case, name): [] for case in cases for name in benches}
    for number in range(args.rounds + 1):
        for case, backend in found:
            value = benches[backend].measure(case)
            if number:  # round 0 warms up
                found[case, backend].append(value)
                row = {"round": number, **named(case), "attention_backend": backend, "ms": round(value, 2)}
                emit({**row, **about}, args.out)
    first, *others = benches
    for (case, backend), values in found.items():
        summary: dict[str, object] = {"summary": f"median of {args.rounds}", **named(case)}
        summary |= {"attention_backend": backend, "ms": round(statistics.median(values), 2)}
        summary["ms_min_max"] = [round(min(values), 2), round(max(values), 2)]
        if case[0] == "step":
            summary["output_tok_per_s"] = round(case[1] / statistics.median(values) * 1000, 1)
        if backend in others:
            ratios = [other / one for one, other in zip(found[case, first], values, strict=True)]
            summary["ratio"] = round(statistics.median(ratios), 2)
            summary["ratio_min_max"] = [round(min(ratios), 2), round(max(ratios), 2)]
        emit({**summary, **about}, args.out)


def named(case: Case) -> dict[str, object]:
    """The columns of a row that say which it is."""
    name, size = case
    return {"case": name, "prompt_tokens" if name == "ttft" else "batch": size}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a directory or a Hub id")
    p.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--kv-cache-gib", type=float, default=1.0)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512, 2048], help="ttft: tokens")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="step: requests at once")
    p.add_argument("--prompt-tokens", type=int, default=128, help="step: of each request")
    p.add_argument("--output-tokens", type=int, default=33, help="step: of each request")
    p.add_argument("--top-id", type=int, default=200_000, help="token ids are below it")
    p.add_argument("--backends", nargs="+", default=["auto"], help="of attention, one or two")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path)
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
