"""Decode attention: achieved share of this GPU's copy rate.

    python benchmarks/kernels/bench_decode_attention.py --model gemma-2-2b --out decode_attention.jsonl

A row is one (provider, shape): median and p20..p80 over `--reps-ms` of graph replays, L2 flushed between.
gb_per_s counts the K and V (and scales) that the queries see, once. Each provider is checked against fp64
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
from attention_problem import MODELS, Heads, Problem, check, contiguous_kv, kv_bytes, make_problem, optional
from gpu_rates import Rates, emit, environment, measure_rates, time_call
from torch import Tensor

from cabochon.kernels.decode_attention import (
    DecodeConfig,
    decode_attention,
    decode_config,
    decode_workspace,
    num_splits,
)
from cabochon.kernels.paged_inputs import kv_bits

SHAPES = [(1, 1024), (1, 8192), (32, 1024), (32, 8192), (256, 1024)]  # sequences, keys of each
BASELINES = {"fa3": "fa3_fwd_interface", "flash-attn": "flash_attn"}
PEERS = {"flex": peers.flex_decode, "flashinfer": peers.flashinfer_decode}
PROVIDERS = ["ours", "ours-fp8", *BASELINES, *PEERS]


class Shape(NamedTuple):
    """Sequences, keys of each, and the layer's kind."""

    seqs: int
    keys: int
    is_sliding: bool


def shapes(heads: Heads, pairs: list[tuple[int, int]]) -> Iterator[Shape]:
    """Global layers for every pair, sliding ones where the window hides something."""
    for seqs, keys in pairs:
        yield Shape(seqs, keys, False)
        if keys > heads.window:
            yield Shape(seqs, keys, True)


def ours(problem: Problem, config: DecodeConfig | None = None) -> Callable[[], Tensor]:
    """The kernel as the engine calls it: buffers made before."""
    (S, Hq, D), device = problem.q.shape, problem.q.device
    config = config or decode_config(device, D, kv_bits(problem.q, problem.k_pages))
    max_len = problem.page_table.shape[1] * problem.k_pages.shape[1]
    splits = num_splits(max_len, problem.window, config.split_tokens)
    workspace, out = decode_workspace(S, Hq, D, splits, device), torch.empty_like(problem.q)
    return lambda: decode_attention(
        problem.q, problem.k_pages, problem.v_pages, problem.page_table, problem.seq_lens,
        **problem.softmax, **problem.scales, workspace=workspace, out=out, config=config,
    )  # fmt: skip


def flash(module: str, problem: Problem) -> Callable[[], Tensor] | None:
    """FlashAttention's decode call on contiguous K and V; None if it is not there or cannot do the layer."""
    library = optional(module)
    if library is None or (module == BASELINES["fa3"] and problem.window is not None):
        return None  # fa3-fwd's wheel has no windows
    k, v = contiguous_kv(problem)
    left = -1 if problem.window is None else problem.window - 1
    options = {"softmax_scale": problem.heads.scale, "softcap": problem.heads.softcap or 0.0}
    q = problem.q[:, None]  # [S, 1, Hq, D]
    return lambda: library.flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=problem.seq_lens,
        causal=True,
        window_size=(left, 0 if left >= 0 else -1),
        **options,
    )[:, 0]


def sweep() -> Iterator[DecodeConfig]:
    """Every tile size that may be the best somewhere."""
    for split, n, warps, stages in itertools.product(
        (128, 256, 512), (16, 32, 64, 128), (2, 4, 8), (2, 3, 4)
    ):
        for programs in (264, 528, 1056, 2112):
            yield DecodeConfig(
                split_tokens=split, block_n=n, programs=programs, num_warps=warps, num_stages=stages
            )


def measure(call: Callable[[], Tensor], problem: Problem, rates: Rates, reps_ms: int) -> dict[str, object]:
    check(call(), problem)
    time = time_call(call, reps_ms)
    moved = kv_bytes(
        problem.heads, len(problem.seq_lens), problem.keys, problem.window, problem.k_pages.itemsize
    )
    rate = moved / time.median_ms / 1e6
    return {**time._asdict(), "gb_per_s": rate, "share_of_copy": rate / rates.copy_gb_per_s}


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
        problem = make_problem(heads, shape.seqs, 1, shape.keys, window, name == "ours-fp8")
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
    p.add_argument("--shapes", type=sizes, nargs="+", default=SHAPES, help="sequences and keys, 32x8192")
    p.add_argument("--sweep", action="store_true", help="every tile size of our kernel")
    p.add_argument("--reps-ms", type=int, default=200)
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
