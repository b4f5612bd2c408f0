"""The likeliest tokens of real hidden rows, by the packed head and by its screen, in turn. CPU with VNNI.

python benchmarks/head_screen.py --rows 1 4 16 64 --out FILE
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from machine import emit, environment
from quantization_quality import Variant, load, windows_of
from tokenizers import Tokenizer
from torch import Tensor

from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.source import locate
from cabochon.engine.native_linear import native_linear
from cabochon.engine.screen import screen_of
from cabochon.kernels.native.sampling import find_largest


def hidden_rows(model: str, count: int) -> tuple[Tensor, Tensor]:
    """[count, E], normalized, of a text of Python's reference; and the embedding."""
    directory = locate(model)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text, bos = "\n\n".join(topics[name] for name in sorted(topics)), tokenizer.token_to_id("<bos>")
    (window,) = windows_of(text, tokenizer, bos, 1, 2 * count + 8)
    loaded = load(directory, load_model_config(directory), Variant(torch.bfloat16), len(window))
    rows = loaded.model.normed(loaded.hidden(window)[8::2])
    return rows[:count].contiguous(), loaded.model.embedding


def turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with torch.inference_mode():
        x, embedding = hidden_rows(args.model, max(args.rows))
        head, screen = native_linear(embedding), screen_of(embedding)
        if screen is None:
            raise SystemExit(
                "the head must have a screen, got none: take a CPU with VNNI, and a C compiler to install"
            )
        expected = (x.double() @ embedding.double().T).argmax(1).tolist()
        assert screen(x, [None] * len(x), None) == expected
        for count in args.rows:
            some = x[:count]
            padded = torch.nn.functional.pad(some, (0, 0, 0, -count % head.row_multiple))
            runs = {
                "head": lambda p=padded: find_largest(head(p)),
                "screen": lambda s=some: screen(s, [None] * len(s), None),
            }
            times = turns(runs, args.repeats)
            medians = {f"{name}_ms": round(statistics.median(of), 2) for name, of in times.items()}
            ratios = [a / b for a, b in zip(times["head"], times["screen"], strict=True)]
            row = {"benchmark": "screen", "rows": count, **medians, "repeats": args.repeats}
            row |= {"ratio": round(statistics.median(ratios), 2), "model": args.model}
            emit({**row, **environment()}, args.out)


if __name__ == "__main__":
    main()
