"""Every kernel family once, on small ragged shapes, beside its definition: what compute-sanitizer watches.

    python benchmarks/gpu/check_kernels.py --only decode_attention prefill_attention
    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/gpu/check_kernels.py

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1 under memcheck: in torch's own pool, a read past a tensor is no error.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import attention_problem
import bench_decode_attention
import bench_embed_norm
import bench_geglu
import bench_lora
import bench_prefill_attention
import bench_prepare_inputs
import bench_qkv_rope_write
import bench_rms_norm
import bench_sample
import bench_sandwich_norm
import timing
import torch
from cases import Row, arguments, run_cases

TOKENS = 5
KEYS = 50  # not a multiple of a page
HEADS = attention_problem.Heads(4, 2, 64, 0.125, 50.0, 20)


def attention(bench: object, queries: int, device: str) -> Iterator[Row]:
    """Global and sliding, in bf16 and fp8."""
    for window in (None, HEADS.window):
        for is_fp8 in (False, True):
            one = attention_problem.make_problem(HEADS, 3, queries, KEYS, window, is_fp8, device=device)
            attention_problem.check(bench.ours(one)(), one)  # type: ignore[attr-defined]
            yield {"window": window, "is_fp8": is_fp8, "is_right": True}


def small(cases: Callable[[], Iterable[timing.Case]]) -> Iterator[Row]:
    """One of the small kernels, by the check of its own benchmark."""
    for case in cases():
        case.run()
        case.check()
        yield {"provider": case.provider, **case.shape, "is_right": True}


def families(device: str) -> dict[str, Callable[[], Iterator[Row]]]:
    """By the name of the file in kernels/."""
    sampled = [(kind, 3, 3000, 2048, device) for kind in bench_sample.KINDS]
    return {
        "decode_attention": partial(attention, bench_decode_attention, 1, device),
        "prefill_attention": partial(attention, bench_prefill_attention, 12, device),
        "rms_norm": partial(small, partial(bench_rms_norm.cases, TOKENS, 640, device)),
        "sandwich_norm": partial(small, partial(bench_sandwich_norm.cases, TOKENS, 640, device)),
        "embed_norm": partial(small, partial(bench_embed_norm.cases, TOKENS, 640, 50, device)),
        "geglu": partial(small, partial(bench_geglu.cases, TOKENS, 2048, device)),
        "qkv_rope_write": partial(
            small,
            lambda: (
                case
                for is_fp8 in (False, True)
                for case in bench_qkv_rope_write.cases("270M", TOKENS, is_fp8, device)
            ),
        ),
        "lora": partial(
            small,
            lambda: (
                case
                for tokens in (TOKENS, bench_lora.MAX_DECODES + 1)
                for case in bench_lora.cases("270M qkv", tokens, 3, 24, device)
            ),
        ),
        "prepare_inputs": partial(small, partial(bench_prepare_inputs.cases, TOKENS, KEYS, device)),
        "sample": partial(small, lambda: (c for one in sampled for c in bench_sample.cases(*one))),
    }


def main() -> int:
    p = arguments(__doc__)
    p.add_argument("--only", nargs="+", choices=families("cpu"))
    args = p.parse_args()
    torch.manual_seed(0)
    chosen = families(args.device)
    return run_cases(
        (f"kernel {name}", run) for name, run in chosen.items() if not args.only or name in args.only
    )


if __name__ == "__main__":
    sys.exit(main())
