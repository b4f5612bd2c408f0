"""What fp8 KV pages do to a model's predictions, beside what bf16 does: no GPU needed.

    python benchmarks/kv_precision.py --model demo --documents 4 --out FILE

The torch attention with K and V as e4m3 pages give them back (`quantize_heads`, the definition of what the
kernel writes), on English text that every Python has: the language reference of pydoc. A row is one pair of
working dtype and KV dtype: the mean negative log-likelihood of the next token, and against fp32 with fp32
pages the mean Kullback-Leibler divergence, its 99th percentile, and how often the likeliest token is the
same.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cabochon.engine.attention import TorchAttention, TorchInputs
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.models.checkpoint import Checkpoint
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.source import locate
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.qkv_rope_write import quantize_heads

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = [("fp32", "auto"), ("fp32", "fp8"), ("bf16", "auto"), ("bf16", "fp8")]
LOGITS_ROWS = 128
PAGE_TOKENS = 16


class RoundedAttention(TorchAttention):
    """K and V pass through e4m3 on their way into the pages."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: TorchInputs) -> Tensor:
        return super().attend(layer, q, _rounded(k), _rounded(v), inputs)


def _rounded(x: Tensor) -> Tensor:
    values, scales = quantize_heads(x)
    return (values.float() * scales[..., None]).to(x.dtype)


def load(directory: Path, dtype: torch.dtype, max_len: int) -> Gemma:
    checkpoint = Checkpoint(directory)
    config, device = load_model_config(directory), torch.device("cpu")
    model = Gemma(config, lambda name, shape: checkpoint.load(name, shape, dtype, device), max_len)
    checkpoint.close()
    return model


def documents(directory: Path, bos_id: int, count: int, length: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text[: count * length * 16], add_special_tokens=False).ids
    assert len(ids) >= count * (length - 1)
    return [[bos_id, *ids[i * (length - 1) : (i + 1) * (length - 1)]] for i in range(count)]


def hidden(model: Gemma, is_fp8: bool, ids: list[int], dtype: torch.dtype) -> Tensor:
    """[T, E], all tokens in one step."""
    config, device = model.config, torch.device("cpu")
    layout = kv_layout(config, PAGE_TOKENS, dtype.itemsize)
    per_group = -(-len(ids) // PAGE_TOKENS)
    pages = KVPages(config, layout, per_group * layout.num_groups, dtype, device)
    rows = Rows(max_seqs=1, max_model_len=len(ids), num_groups=layout.num_groups, page_tokens=PAGE_TOKENS)
    row = rows.take(ids, len(ids))
    for group, table in enumerate(rows.page_tables):
        table[row, :per_group] = np.arange(per_group) + group * per_group + 1
    one, length = np.array([row], np.int32), np.array([len(ids)], np.int32)
    plan = Plan(one, np.zeros(1, np.int32), length, np.ones(1, np.bool_), 0)
    attention = (RoundedAttention if is_fp8 else TorchAttention)(config, pages)
    return model.hidden(torch.tensor(ids), attention.prepare(plan, rows), attention)


@torch.inference_mode()
def compare(models: dict[str, Gemma], ids: list[int]) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Per case [tokens, 3]: negative log-likelihood, divergence, whether the likeliest token is the same."""
    states = {case: hidden(models[case[0]], case[1] == "fp8", ids, DTYPES[case[0]]) for case in CASES}
    for start in range(0, len(ids), LOGITS_ROWS):
        part = slice(start, start + LOGITS_ROWS)
        next_ids = torch.tensor(ids[1:][part])
        truth = None
        for case, rows in states.items():
            found = models[case[0]].logits(rows[part]).float().log_softmax(-1)[: len(next_ids)]
            truth = found if truth is None else truth  # the first case is the exact one
            nll = -found.gather(1, next_ids[:, None])[:, 0]
            divergence = (truth.exp() * (truth - found)).sum(-1)
            yield case, torch.stack([nll, divergence, (truth.argmax(-1) == found.argmax(-1)).float()], 1)


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="of a document, a multiple of 4")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    directory = locate(args.model)
    models = {name: load(directory, dtype, args.tokens) for name, dtype in DTYPES.items()}
    bos_id = models["fp32"].config.bos_token_id
    assert bos_id is not None
    parts: dict[tuple[str, str], list[Tensor]] = {case: [] for case in CASES}
    for ids in documents(directory, bos_id, args.documents, args.tokens):
        for case, values in compare(models, ids):
            parts[case].append(values)
    lines = []
    for (dtype, kv_dtype), found in parts.items():
        nll, divergence, is_same = torch.cat(found).unbind(1)
        row = {
            "dtype": dtype, "kv_dtype": kv_dtype, "tokens": len(nll), "nll": round(float(nll.mean()), 4),
            "kl_mean": round(float(divergence.mean()), 5),
            "kl_p99": round(float(divergence.quantile(0.99)), 4),
            "top1_same": round(float(is_same.mean()), 4), "model": args.model,
            "python": platform.python_version(), "torch": torch.__version__,
        }  # fmt: skip
        lines.append(json.dumps(row))
        print(lines[-1])
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
