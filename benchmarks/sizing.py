"""What fits where: Gemma 2 on the GPUs of GKE, from the engine's own weights, pages and memory budget.

    python benchmarks/sizing.py            writes the table in docs/sizing.md
    python benchmarks/sizing.py --json     prints a row a line

Weights are counted by building the engine's model without memory, pages by its layout and its budget at the
default options. Tokens per second are a roofline times a share: that of a row of `results/` for this GPU and
model, or else ESTIMATED_SHARE, and the table says which. A dollar figure needs a price with a source in
`prices.yaml`. No weights are read, no GPU is needed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks" / "gpu"))
from random_engine import key_bytes, visible_keys  # noqa: E402  # after the path
from random_weights import configuration, directory  # noqa: E402

from cabochon.engine.config import EngineConfig  # noqa: E402
from cabochon.engine.errors import ConfigError  # noqa: E402
from cabochon.engine.gpu_memory import GIB, pool_bytes  # noqa: E402
from cabochon.engine.kv_layout import KVLayout, kv_layout  # noqa: E402
from cabochon.engine.linear import Fp8Linear, Linear  # noqa: E402
from cabochon.engine.models.config import ModelConfig  # noqa: E402
from cabochon.engine.models.gemma import Gemma  # noqa: E402
from cabochon.engine.models.hf_config import load_model_config  # noqa: E402
from cabochon.engine.scheduler import MAX_CHUNK_TOKENS, WATERMARK  # noqa: E402
from cabochon.engine.settle import FP8_CAPABILITY  # noqa: E402

DOCUMENT = ROOT / "docs" / "sizing.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks/sizing.py -->", "<!-- end -->"
SIZES = ("2b", "9b", "27b")
PAGE_TOKENS = 16
LONG = 8192  # tokens: Gemma 2's context
CONTEXT = 1024  # tokens of each sequence whose next token is timed
MAX_BATCH = 256
STEP_GIB = (
    1.0  # estimate: CUDA's context, kernels, graphs and the largest step. At start the engine measures it
)
COPY_SHARE = (
    0.9  # of the data sheet's bandwidth: 3.0 of 3.35 TB/s on an H100, 4.3 of 4.8 on an H200, measured
)
PRODUCT_SHARE = 0.8  # of the data sheet's dense bf16 rate: 798 of 989 TFLOP/s on an H100, measured
ESTIMATED_SHARE = 0.7  # of the roofline in decode, until `make gpu-check` has run on the GPU
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GPU:
    """total_gib: as torch reports it. The rest is NVIDIA's data sheets', without sparsity."""

    name: str
    device: str  # in torch's name of it, of which results have one
    total_gib: float
    gb_per_s: float
    bf16_tflop_per_s: float
    capability: tuple[int, int]


# total_gib from messages of torch: ArcInstitute/evo2 #190, TianheWu/CoSeR #10, wbfwonderful/Vad-R1 #11,
# vllm-project/vllm #27508; the H200's is rounded down
GPUS = (
    GPU("L4", "L4", 22.03, 300, 121, (8, 9)),
    GPU("A100 40GB", "A100-SXM4-40GB", 39.50, 1555, 312, (8, 0)),
    GPU("A100 80GB", "A100-SXM4-80GB", 79.25, 2039, 312, (8, 0)),
    GPU("H100 80GB", "H100 80GB", 79.11, 3350, 989, (9, 0)),
    GPU("H200 141GB", "H200", 139.0, 4800, 989, (9, 0)),
)


@dataclass(frozen=True, slots=True)
class Model:
    """weight_bytes: resident. read_bytes: of them by every step: of the head a quantized copy."""

    config: ModelConfig
    weight_bytes: int
    read_bytes: int


@cache
def model(size: str, quantization: str) -> Model:
    """Counted from the engine's model with one layer and with two: all layers are of a size."""
    with directory(configuration(size)) as folder:
        config = load_model_config(folder)
    first, second = (_without_memory(config, quantization, layers) for layers in (1, 2))
    weight_bytes = first.num_bytes + (config.num_layers - 1) * (second.num_bytes - first.num_bytes)
    unread = first.embedding.nbytes if first.has_quantized_head else 0
    return Model(config, weight_bytes, weight_bytes - unread)


def _without_memory(config: ModelConfig, quantization: str, layers: int) -> Gemma:
    """On torch's meta device, where tensors have only a shape."""

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    some = replace(config, num_layers=layers, is_sliding=config.is_sliding[:layers])
    return Gemma(some, load, LONG, Fp8Linear if quantization == "fp8" else Linear)


def layout_of(config: ModelConfig, kv_dtype: str) -> KVLayout:
    """As the engine cuts it."""
    is_fp8 = kv_dtype == "fp8"
    return kv_layout(config, PAGE_TOKENS, 1 if is_fp8 else 2, has_scales=is_fp8)


def num_pages(gpu: GPU, weight_bytes: int, layout: KVLayout) -> int:
    """Of the pool, 0 if nothing is left for one."""
    total, taken = int(gpu.total_gib * GIB), int(STEP_GIB * GIB)
    share = EngineConfig().gpu_memory_utilization
    try:
        left = pool_bytes(total=total, used=weight_bytes, peak=taken, utilization=share)
    except ConfigError:
        return 0
    return left // layout.page_bytes


def sequences(layout: KVLayout, pages: int, tokens: int) -> int:
    """That hold this many tokens each at once; the first may use what admission keeps free for the others."""
    chunk = min(EngineConfig().step_tokens, MAX_CHUNK_TOKENS)
    one = layout.pages_per_sequence(tokens, chunk)
    return max((pages - int(WATERMARK * pages)) // one, int(pages >= one))


def roofline_tok_per_s(gpu: GPU, one: Model, seqs: int, quantization: str, kv_dtype: str) -> float:
    """Decode of so many sequences of CONTEXT tokens: weights and visible K and V read, or products done."""
    config = one.config
    keys = visible_keys(config, np.full(seqs, CONTEXT))
    scale_bytes = 2 * config.num_kv_heads * 4 if kv_dtype == "fp8" else 0
    read = one.read_bytes + keys * (key_bytes(config, 1 if kv_dtype == "fp8" else 2) + scale_bytes)
    weight_bytes = 1 if quantization == "fp8" else 2  # of an element
    flops = 2 * one.read_bytes / weight_bytes * seqs + 4 * config.num_heads * config.head_dim * keys
    rate = gpu.bf16_tflop_per_s * PRODUCT_SHARE * (2 if quantization == "fp8" else 1)
    return seqs / max(read / (gpu.gb_per_s * COPY_SHARE * 1e9), flops / (rate * 1e12))


def measured_share(gpu: GPU, size: str, folder: Path = RESULTS) -> tuple[float, str] | None:
    """Largest share of the roofline in decode and its file; of the largest batch. None without a result."""
    found: list[tuple[int, float, str]] = []
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            is_ours = gpu.device in str(row.get("device")) and row.get("size") == size
            if is_ours and "share_of_roofline" in row and str(row.get("case", "")).startswith("decode"):
                found.append((int(row["seqs"]), float(row["share_of_roofline"]), path.name))
    if not found:
        return None
    _, share, name = max(found)
    return share, name


def price(gpu: GPU, prices: dict[str, Any]) -> float | None:
    """Dollars an hour. None without a source and a date."""
    known = prices.get(gpu.name) or {}
    return float(known["usd_per_hour"]) if known.get("source") and known.get("date") else None


def row(gpu: GPU, size: str, quantization: str, kv_dtype: str, prices: dict[str, Any]) -> Row:
    """One line of the table."""
    one = model(size, quantization)
    named: Row = {"model": size, "gpu": gpu.name, "weights": quantization, "kv": kv_dtype}
    if quantization == "fp8" and gpu.capability < FP8_CAPABILITY:  # fp8 pages are no matter of products
        return {**named, "fits": False, "why": "fp8 products need compute capability 8.9"}
    layout = layout_of(one.config, kv_dtype)
    pages = num_pages(gpu, one.weight_bytes, layout)
    named["weight_bytes"] = one.weight_bytes
    long = sequences(layout, pages, LONG)
    if not sequences(layout, pages, CONTEXT):
        return {**named, "fits": False, "why": "no room for KV pages"}
    batch = min(MAX_BATCH, sequences(layout, pages, CONTEXT))
    share, source = measured_share(gpu, size) or (ESTIMATED_SHARE, "estimate")
    rate = share * roofline_tok_per_s(gpu, one, batch, quantization, kv_dtype)
    cost = price(gpu, prices)
    return {
        **named,
        "fits": True,
        "kv_tokens": pages // layout.num_groups * layout.page_tokens,
        "sequences_8k": long,
        "batch": batch,
        "tok_per_s": rate,
        "share": share,
        "share_source": source,
        "usd_per_million_tokens": None if cost is None else cost / (rate * 3600) * 1e6,
    }


def rows() -> Iterator[Row]:
    """All of them, by model and GPU."""
    prices = yaml.safe_load((ROOT / "benchmarks" / "prices.yaml").read_text())
    for size, gpu, quantization, kv_dtype in product(SIZES, GPUS, ("bf16", "fp8"), ("bf16", "fp8")):
        yield row(gpu, size, quantization, kv_dtype, prices)


def table(made: list[Row]) -> str:
    """Markdown."""
    head = ["model", "GPU", "weights", "KV", "fits", "weights, GB", "KV tokens", "8k sequences",
            "decode tok/s", "of the roofline", "$ per 1M tokens"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for one in made:
        start = [one["model"], one["gpu"], one["weights"], one["kv"]]
        weights = f"{one['weight_bytes'] / 1e9:.2f}" if "weight_bytes" in one else ""
        if not one["fits"]:
            lines.append([*start, f"no: {one['why']}", weights, *[""] * 5])
            continue
        share = f"{one['share']:.0%} ({one['share_source']})"
        dollars = one["usd_per_million_tokens"]
        rate = f"{float(format(one['tok_per_s'], '.2g')):,.0f} at {one['batch']}"
        fits = "yes" if one["sequences_8k"] else "not 8k"
        cells = [fits, weights, f"{one['kv_tokens']:,}", str(one["sequences_8k"]), rate, share]
        lines.append([*start, *cells, "" if dollars is None else f"{dollars:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(document: str) -> str:
    """The document with the table of now between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(list(rows()))}\n{END}{after}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", action="store_true", help="print rows, write nothing")
    if p.parse_args().json:
        for one in rows():
            print(json.dumps(one))
    else:
        DOCUMENT.write_text(written(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
