"""Inputs of the attention benchmarks: Gemma's heads, random pages, contiguous K and V, checks."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.paged_attention import paged_attention_reference

PAGE_TOKENS = 16
CHECKED_SEQS = 2
CHECKED_QUERIES = 32  # the last ones of a sequence: on the CPU, in fp64
E4M3 = torch.float8_e4m3fn


class Heads(NamedTuple):
    """Of one attention layer. window: W of the sliding layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int


MODELS = {
    "gemma-2-2b": Heads(8, 4, 256, 256**-0.5, 50.0, 4096),
    "gemma-2-9b": Heads(16, 8, 256, 256**-0.5, 50.0, 4096),
    "gemma-2-27b": Heads(32, 16, 128, 144**-0.5, 50.0, 4096),
    "gemma-3-270m": Heads(4, 1, 256, 256**-0.5, None, 512),
}


class Problem(NamedTuple):
    """S sequences of `keys` keys each, the last `queries` of them with a query.

    q: [S · queries, Hq, D] bf16. Pages hold bf16, or e4m3 with scales: [N, P, Hkv, D] in a random order.
    """

    heads: Heads
    queries: int
    keys: int
    window: int | None
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    scales: dict[str, Tensor]

    @property
    def softmax(self) -> dict[str, Any]:
        return {"scale": self.heads.scale, "softcap": self.heads.softcap, "window": self.window}


def visible_pairs(queries: int, keys: int, window: int | None) -> int:
    """(query, key) pairs of a sequence: query i of the last `queries` sees keys up to its own, at most W."""
    most = keys if window is None else window
    first = keys - queries + 1  # keys up to the first query
    growing = max(0, min(keys, most) - first + 1)  # queries that see all keys before them
    return growing * (2 * first + growing - 1) // 2 + (queries - growing) * most


def flops(heads: Heads, seqs: int, pairs: int) -> int:
    """Two products of 2 · D operations for every visible pair and query head."""
    return 4 * heads.head_dim * heads.num_heads * seqs * pairs


def kv_bytes(heads: Heads, seqs: int, keys: int, window: int | None, itemsize: int) -> int:
    """K and V that one query of each sequence sees; e4m3 (itemsize 1) has a scale of four bytes per row."""
    seen = keys if window is None else min(keys, window)
    row = heads.head_dim * itemsize + (4 if itemsize == 1 else 0)
    return 2 * seqs * seen * heads.num_kv_heads * row


def make_problem(
    heads: Heads, seqs: int, queries: int, keys: int, window: int | None, is_fp8: bool, device: str = "cuda"
) -> Problem:
    """Random numbers of a trained layer's size: scores of a few units, no page in its place."""
    pages_per_seq = -(-keys // PAGE_TOKENS)
    shape = (seqs * pages_per_seq + 1, PAGE_TOKENS, heads.num_kv_heads, heads.head_dim)
    numbers = torch.randperm(shape[0] - 1, device=device, dtype=torch.int32) + 1
    pages = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
    scales = {}
    if is_fp8:
        pages = [part.to(E4M3) for part in pages]
        scales = {name: torch.rand(shape[:3], device=device) + 0.5 for name in ("k_scales", "v_scales")}
    return Problem(
        heads=heads,
        queries=queries,
        keys=keys,
        window=window,
        q=torch.randn(seqs * queries, heads.num_heads, heads.head_dim, device=device, dtype=torch.bfloat16),
        k_pages=pages[0],
        v_pages=pages[1],
        page_table=numbers.view(seqs, pages_per_seq),
        cu_seqlens_q=torch.arange(seqs + 1, device=device, dtype=torch.int32) * queries,
        seq_lens=torch.full((seqs,), keys, device=device, dtype=torch.int32),
        scales=scales,
    )


def contiguous_kv(problem: Problem) -> tuple[Tensor, Tensor]:
    """K and V as libraries without pages take them: two [S, keys, Hkv, D]. Costs a copy of both."""
    table = problem.page_table.long()
    k, v = (pages[table].flatten(1, 2)[:, : problem.keys] for pages in (problem.k_pages, problem.v_pages))
    return k.contiguous(), v.contiguous()


def check(out: Tensor, problem: Problem) -> None:
    """Compare the last queries of the first and last sequences with the definition in fp64, on the CPU.

    Raises AssertionError beyond the error budget.
    """
    queries, seqs = min(problem.queries, CHECKED_QUERIES), len(problem.seq_lens)
    for seq in sorted({0, seqs - 1})[:CHECKED_SEQS]:
        end = (seq + 1) * problem.queries
        row = problem.page_table[seq].long()
        pages = [
            torch.cat([torch.zeros_like(p[:1]), p[row]]).cpu() for p in (problem.k_pages, problem.v_pages)
        ]
        scales = {k: torch.cat([torch.zeros_like(s[:1]), s[row]]).cpu() for k, s in problem.scales.items()}
        q = problem.q[end - queries : end].cpu()
        table = torch.arange(1, len(row) + 1, dtype=torch.int32)[None]
        cu = torch.tensor([0, queries], dtype=torch.int32)
        truth, low = (
            paged_attention_reference(
                q.to(dtype), *(p if scales else p.to(dtype) for p in pages), table, cu,
                problem.seq_lens[seq : seq + 1].cpu(), **scales, **problem.softmax,
            )
            for dtype in (torch.float64, torch.bfloat16)
        )  # fmt: skip
        assert_within_budget(out[end - queries : end].cpu(), low, truth)


def optional(module: str) -> ModuleType | None:
    """A baseline's module, or None: it is absent, or was built for another CUDA or torch."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):
        return None
