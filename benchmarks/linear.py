"""Products of bf16 rows with a model's weights, in C and by oneDNN, in turn. CPU with AVX512_BF16 and no AMX.

python benchmarks/linear.py --rows 1 4 16 64 512 --out FILE

A product with each weight of each layer, one after the other, as a step has them: what was read last time is
no longer in the cache. Weights and rows are random, of the model's shapes.
"""

import argparse
import statistics
from pathlib import Path

import torch
from head_screen import turns
from machine import emit, environment
from torch import Tensor

from cabochon.engine.adapters.adapter import linear_shapes
from cabochon.engine.linear import AnyLinear, Linear
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.source import locate
from cabochon.engine.native_linear import NativeLinear
from cabochon.kernels.native.linear import can_multiply


def weights_of(model: str) -> list[Tensor]:
    """[n, k] bf16, of all layers."""
    config = load_model_config(locate(model))
    shapes = [(shape.n, shape.k) for shape in linear_shapes(config).values()]
    return [torch.randn(n, k).bfloat16() for _ in range(config.num_layers) for n, k in shapes]


def multiply(linears: list[AnyLinear], rows: int) -> None:
    """`rows` with each weight."""
    for linear in linears:
        linear(torch.ones((rows, linear.in_features), dtype=torch.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not can_multiply():
        raise SystemExit("products must be ours here, got oneDNN's: take a CPU with AVX512_BF16 and no AMX")
    weights = weights_of(args.model)
    ours: list[AnyLinear] = [NativeLinear(weight) for weight in weights]
    onednn: list[AnyLinear] = [Linear(weight.clone()) for weight in weights]
    for count in args.rows:
        padded = count + -count % Linear.row_multiple  # as the engine does
        runs = {"onednn": lambda n=padded: multiply(onednn, n), "ours": lambda n=count: multiply(ours, n)}
        turns(runs, 2)
        times = turns(runs, args.repeats)
        ratios = [a / b for a, b in zip(times["onednn"], times["ours"], strict=True)]
        row: dict[str, object] = {"benchmark": "linear", "rows": count, "repeats": args.repeats}
        row |= {f"{name}_ms": round(statistics.median(of), 2) for name, of in times.items()}
        row |= {"ratio": round(statistics.median(ratios), 2), "model": args.model}
        emit({**row, **environment()}, args.out)


if __name__ == "__main__":
    main()
