"""Prefill attention: achieved share of this GPU's bf16 matrix product.

    python benchmarks/kernels/bench_prefill_attention.py --model gemma-2-2b --out prefill_attention.jsonl

A row is one (provider, shape): median and p20..p80 over `--reps-ms` of graph replays, L2 flushed between.
tflop_per_s counts the pairs that are visible, not the tiles computed. Each provider is checked against fp64
before it is timed. A baseline that is not installed, or cannot do the layer, gets a row that says 'absent'.
--sweep times every tile size instead of the table's, to fill kernels/_tune.json.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import attention_peers as peers
import torch
import triton
from attention_problem import (
    MODELS,
    Heads,
    Problem,
    check,
    contiguous_kv,
    flops,
    make_problem,
    optional,
    visible_pairs,
)
from gpu_rates import Rates, emit, environment, measure_rates, time_call
from torch import Tensor

from cabochon.kernels.prefill_attention import PrefillConfig, prefill_attention

SHAPES = [(1, 1024, 1024), (8, 1024, 1024), (1, 8192, 8192), (1, 2048, 8192)]  # sequences, queries, keys
BASELINES = {"fa3": "fa3_fwd_interface", "flash-attn": "flash_attn"}
PEERS = {"flex": peers.flex_prefill, "flashinfer": peers.flashinfer_prefill}
PROVIDERS = ["ours", "ours-fp8", *BASELINES, *PEERS]


class Shape(NamedTuple):
    """Sequences, queries and keys of each, and the layer's kind."""

    seqs: int
    queries: int
    keys: int
    is_sliding: bool


def shapes(heads: Heads, sizes: list[tuple[int, int, int]]) -> Iterator[Shape]:
    """Global layers for every size, sliding ones where the window hides something."""
    for seqs, queries, keys in sizes:
        yield Shape(seqs, queries, keys, False)
        if keys > heads.window:
            yield Shape(seqs, queries, keys, True)


def ours(problem: Problem, config: PrefillConfig | None = None) -> Callable[[], Tensor]:
    """The kernel as the engine calls it: buffers made before."""
    out = torch.empty_like(problem.q)
    return lambda: prefill_attention(
        problem.q, problem.k_pages, problem.v_pages, problem.page_table, problem.cu_seqlens_q,
        problem.seq_lens, **problem.softmax, **problem.scales, out=out, config=config,
    )  # fmt: skip


def flash(module: str, problem: Problem) -> Callable[[], Tensor] | None:
    """FlashAttention's varlen call on contiguous K and V; None if it is not there or cannot do the layer."""
    library = optional(module)
    if library is None or (module == BASELINES["fa3"] and problem.window is not None):
        return None  # fa3-fwd's wheel has no windows
    k, v = (part.flatten(0, 1) for part in contiguous_kv(problem))  # [S · keys, Hkv, D]
    cu_seqlens_k = torch.arange(len(problem.cu_seqlens_q), device=k.device, dtype=torch.int32) * problem.keys
    left = -1 if problem.window is None else problem.window - 1
    options = {"softmax_scale": problem.heads.scale, "softcap": problem.heads.softcap or 0.0}
    return lambda: library.flash_attn_varlen_func(
        problem.q, k, v, problem.cu_seqlens_q, cu_seqlens_k, problem.queries, problem.keys,
        causal=True, window_size=(left, 0 if left >= 0 else -1), **options,
    )  # fmt: skip


def sweep() -> Iterator[PrefillConfig]:
    """Every tile size that may be the best somewhere."""
    for m, n, warps, stages, parts, ptx in itertools.product(
        (64, 128), (16, 32, 64, 128), (4, 8), (2, 3), (1, 2, 4), (True, False)
    ):
        yield PrefillConfig(
            block_m=m, block_n=n, num_warps=warps, num_stages=stages, parts=parts, use_ptx_tanh=ptx
        )


def measure(call: Callable[[], Tensor], problem: Problem, rates: Rates, reps_ms: int) -> dict[str, object]:
    check(call(), problem)
    time = time_call(call, reps_ms)
    pairs = visible_pairs(problem.queries, problem.keys, problem.window)
    rate = flops(problem.heads, len(problem.seq_lens), pairs) / time.median_ms / 1e9
    return {**time._asdict(), "tflop_per_s": rate, "share_of_product": rate / rates.product_tflop_per_s}


def baseline(name: str, problem: Problem, rates: Rates, reps_ms: int) -> dict[str, object]:
    """Its row, or why it has none: what others built may break in many ways, and ends nothing here."""
    try:
        call = flash(BASELINES[name], problem) if name in BASELINES else PEERS[name](problem)
        return {"absent": True} if call is None else measure(call, problem, rates, reps_ms)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:500]}


def rows(args: argparse.Namespace, rates: Rates) -> Iterator[dict[str, object]]:
    heads = MODELS[args.model]
    for shape, name in itertools.product(list(shapes(heads, args.shapes)), args.providers):
        window = heads.window if shape.is_sliding else None
        problem = make_problem(heads, shape.seqs, shape.queries, shape.keys, window, name == "ours-fp8")
        row = {"provider": name, **shape._asdict()}
        if name in BASELINES or name in PEERS:
            yield row | baseline(name, problem, rates, args.reps_ms)
        elif not args.sweep:
            yield row | measure(ours(problem), problem, rates, args.reps_ms)
        else:
            for config in sweep():
                try:
                    result = measure(ours(problem, config), problem, rates, args.reps_ms)
                except triton.runtime.errors.OutOfResources:
                    continue
                yield row | {"config": repr(config)} | result


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    rates, env = measure_rates(args.reps_ms), environment()
    for row in rows(args, rates):
        emit({"model": args.model, **row, **rates._asdict(), **env}, args.out)


def sizes(text: str) -> tuple[int, ...]:
    """Numbers with an x between."""
    return tuple(map(int, text.split("x")))


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="gemma-2-2b")
    p.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    p.add_argument(
        "--shapes", type=sizes, nargs="+", default=SHAPES, help="sequences, queries and keys, 1x8192x8192"
    )
    p.add_argument("--sweep", action="store_true", help="every tile size of our kernel")
    p.add_argument("--reps-ms", type=int, default=200)
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
