"""What fp8 and int8 cost in quality: next-token distributions beside fp32's, on real weights.

    python benchmarks/quantization_quality.py --windows 4 --window-tokens 512 --out FILE

The text is Python's own reference (pydoc_data, in every installation), or a file's; its windows are taken at
even distances, each a sequence of its own after <bos>. A row is one approximation: the KL divergence from
fp32 in nats per token (mean, median, 99th percentile), the share of tokens whose likeliest next token is the
same, and the perplexity of the text beside fp32's. CPU only: products in fp8 are emulated on e4m3's numbers,
sums in fp32, so the figures are of the format, not of a GPU's kernel; int8 is what the engine runs. `bf16` is
the yardstick: what rounding costs that everyone accepts. fp8 KV: keys and values go through e4m3 with a scale
per token and head.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cabochon.engine.attention import TorchAttention, TorchInputs
from cabochon.engine.int8_linear import Int8Head, Int8Linear
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.linear import Fp8Linear, Linear, MakeLinear
from cabochon.engine.models.checkpoint import Checkpoint
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.source import locate
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.definitions import quantize_rows, softcap_

PAGE_TOKENS = 16
LOGITS_ROWS = 32  # rows of logits at once: 32 × 262,144 in fp32 are 34 MB


class Fp8KVAttention(TorchAttention):
    """Keys and values as e4m3 pages would give them back."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: TorchInputs) -> Tensor:
        return super().attend(layer, q, through_e4m3(k), through_e4m3(v), inputs)


def through_e4m3(x: Tensor) -> Tensor:
    """x as e4m3 and a scale per row of its last axis give it back."""
    values, scales = quantize_rows(x)
    return (values.float() * scales[..., None]).to(x.dtype)


def rounded_weight(weight: Tensor) -> Linear:
    """Only the weight in e4m3: what a kernel for bf16 activations would compute."""
    return Linear(through_e4m3(weight))


class CoarseInt8Linear(Int8Linear):
    """With x in 8 bits, a scale per token. What it costs is why the engine does not."""

    def __call__(self, x: Tensor) -> Tensor:
        scales = x.abs().amax(1, keepdim=True) / 127
        return super().__call__((x / scales).round() * scales)


class Variant(NamedTuple):
    """What differs from fp32."""

    dtype: torch.dtype = torch.float32
    layers: MakeLinear = Linear
    head: MakeLinear = Linear
    attention: type[TorchAttention] = TorchAttention


VARIANTS = {
    "bf16": Variant(torch.bfloat16),
    "fp8 layers": Variant(layers=Fp8Linear),
    "fp8 layers and head": Variant(layers=Fp8Linear, head=Fp8Linear),
    "fp8 KV": Variant(attention=Fp8KVAttention),
    "fp8 layers, head and KV": Variant(layers=Fp8Linear, head=Fp8Linear, attention=Fp8KVAttention),
    "bf16, fp8 layers and head": Variant(torch.bfloat16, Fp8Linear, Fp8Linear),
    "e4m3 weights of layers and head alone": Variant(layers=rounded_weight, head=rounded_weight),
    "int8 layers": Variant(layers=Int8Linear),
    "int8 layers, x in 8 bits": Variant(layers=CoarseInt8Linear),
    "int8 head": Variant(head=Int8Head),
    "int8 layers and head": Variant(layers=Int8Linear, head=Int8Head),
    "bf16, int8 layers and head": Variant(torch.bfloat16, Int8Linear, Int8Head),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and pages for one window."""

    model: Gemma
    attention: TorchAttention
    num_groups: int

    def hidden(self, ids: list[int]) -> Tensor:
        """[len(ids), E], one sequence in one step."""
        num_pages = -(-len(ids) // PAGE_TOKENS)
        rows = Rows(max_seqs=1, max_model_len=len(ids), num_groups=self.num_groups, page_tokens=PAGE_TOKENS)
        row = rows.take(ids, len(ids))
        rows.page_tables[:, row] = 1 + np.arange(self.num_groups * num_pages).reshape(-1, num_pages)
        plan = Plan(
            np.array([row], np.int32),
            np.zeros(1, np.int32),
            np.array([len(ids)], np.int32),
            np.ones(1, np.bool_),
            num_decodes=0,
        )
        padded = torch.tensor(ids + [0] * (-len(ids) % 4))
        return self.model.hidden(padded, self.attention.prepare(plan, rows), self.attention)[: len(ids)]

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """hidden: [R, E], R a multiple of 4. Returns [R, V] fp32."""
        logits = self.model.logits(hidden).float()
        cap = self.model.config.final_softcap
        return (logits if cap is None else softcap_(logits, cap)).log_softmax(-1)


class Scores(NamedTuple):
    """Per token: KL divergence from the reference, whether the likeliest is the same, −log p of the next."""

    divergence: Tensor
    is_same: Tensor
    reference_loss: Tensor
    loss: Tensor


def load(directory: Path, config: ModelConfig, variant: Variant, window_tokens: int) -> Loaded:
    checkpoint = Checkpoint(directory)
    model = Gemma(
        config,
        lambda name, shape: checkpoint.load(name, shape, variant.dtype),
        window_tokens,
        variant.layers,
        variant.head,
    )
    checkpoint.close()
    layout = kv_layout(config, PAGE_TOKENS, variant.dtype.itemsize)
    num_pages = layout.num_groups * -(-window_tokens // PAGE_TOKENS)
    pages = KVPages(config, layout, num_pages, variant.dtype, torch.device("cpu"))
    return Loaded(model, variant.attention(config, pages), layout.num_groups)


def windows_of(text: str, tokenizer: Tokenizer, bos: int, count: int, window_tokens: int) -> list[list[int]]:
    """`count` windows at even distances, each with <bos> in front."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    body = window_tokens - 1
    assert len(ids) >= count * body, f"the text has {len(ids)} tokens, {count * body} are needed"
    starts = [round(i * (len(ids) - body) / max(count - 1, 1)) for i in range(count)]
    return [[bos, *ids[start : start + body]] for start in starts]


@torch.inference_mode()
def compare(reference: Loaded, hidden: list[Tensor], variant: Loaded, windows: list[list[int]]) -> Scores:
    """hidden: the reference's, per window; its distributions are made again, they are too large to keep."""
    found: list[Scores] = []
    for ids, expected in zip(windows, hidden, strict=True):
        ours = variant.hidden(ids)
        for start in range(0, len(ids), LOGITS_ROWS):
            part = slice(start, start + LOGITS_ROWS)
            p, q = reference.log_probabilities(expected[part]), variant.log_probabilities(ours[part])
            following = torch.tensor(ids[start + 1 : start + 1 + LOGITS_ROWS])[:, None]
            p, q = p[: len(following)], q[: len(following)]  # the last token of a window has no next one
            divergence = (p.exp() * (p - q)).sum(-1)
            losses = [-one.gather(1, following)[:, 0] for one in (p, q)]
            found.append(Scores(divergence, p.argmax(-1) == q.argmax(-1), *losses))
    return Scores(*(torch.cat(column) for column in zip(*found, strict=True)))


def summary(scores: Scores) -> dict[str, object]:
    def digits(x: float) -> float:
        return float(f"{x:.4g}")

    divergence = scores.divergence.double()
    return {
        "kl_mean": digits(divergence.mean().item()),
        "kl_median": digits(divergence.median().item()),
        "kl_p99": digits(divergence.quantile(0.99).item()),
        "same_top1": digits(scores.is_same.double().mean().item()),
        "perplexity": digits(math.exp(scores.loss.double().mean())),
        "perplexity_fp32": digits(math.exp(scores.reference_loss.double().mean())),
        "tokens": len(divergence),
    }


def environment() -> dict[str, object]:
    """All that a reader needs to repeat a row: written into every one."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    directory = locate(args.model)
    config = load_model_config(directory)
    text = args.text.read_text() if args.text else "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    bos = tokenizer.token_to_id("<bos>")
    windows = windows_of(text, tokenizer, bos, args.windows, args.window_tokens)
    reference = load(directory, config, Variant(), args.window_tokens)
    with torch.inference_mode():
        hidden = [reference.hidden(ids) for ids in windows]
    shape = {"model": args.model, "windows": args.windows, "window_tokens": args.window_tokens}
    shape["text"] = args.text.name if args.text else "pydoc_data.topics"
    for name in args.variants:
        started_s = time.perf_counter()
        loaded = load(directory, config, VARIANTS[name], args.window_tokens)
        scores = compare(reference, hidden, loaded, windows)
        took_s = round(time.perf_counter() - started_s, 1)
        line = json.dumps({"variant": name, **summary(scores), **shape, "took_s": took_s, **environment()})
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(line + "\n")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a directory or a Hub id")
    p.add_argument("--text", type=Path, help="a text file; default: Python's reference, from pydoc_data")
    p.add_argument("--windows", type=int, default=4)
    p.add_argument("--window-tokens", type=int, default=512)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
