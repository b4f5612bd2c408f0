"""Sequences that live through steps of an attention backend, as the engine drives it, beside a dense oracle.

Pages come in random order, free ones hold NaN, and pages behind a window go back after each step. Layer 0
slides, layer 1 does not.
"""

import dataclasses
import random

import numpy as np
import torch
from random_gemma import BASE, model_config
from torch import Tensor
from transformers import Gemma2Config

from cabochon.engine.attention import Backend, make_attention
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.error_budget import assert_within_budget

SLIDING, GLOBAL = 0, 1
MAX_PAGES = 5  # of a sequence
CPU = torch.device("cpu")


class AttentionWorld:
    """step() computes the next tokens of some sequences, with random q, k and v, in both layers."""

    def __init__(
        self,
        backend: Backend,
        page_tokens: int,
        *,
        window: int,
        softcap: float | None = 50.0,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        max_seqs: int = 6,
        device: torch.device = CPU,
    ) -> None:
        self.config = dataclasses.replace(
            model_config(Gemma2Config(**{**BASE, "num_hidden_layers": 2})),
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=head_dim,
            window=window,
            attention_softcap=softcap,
        )
        layout = kv_layout(self.config, page_tokens, dtype.itemsize)
        num_pages = 2 * max_seqs * MAX_PAGES
        self.pages = KVPages(self.config, layout, num_pages, dtype, device)
        self._tensors = (*self.pages.k, *self.pages.v)
        for tensor in self._tensors:
            tensor[1:] = torch.nan
        self.rows = Rows(
            max_seqs=max_seqs, max_model_len=MAX_PAGES * page_tokens, num_groups=2, page_tokens=page_tokens
        )
        self.attention = make_attention(backend, self.config, self.pages)
        self.g = torch.Generator().manual_seed(0)
        self._free = random.Random(0).sample(range(1, num_pages + 1), num_pages)
        self._dtype, self._device = dtype, device
        empty = [torch.empty(0, heads[1], head_dim, dtype=dtype, device=device)] * 2
        self.history = {row: (list(empty), list(empty)) for row in range(max_seqs)}  # K and V of each layer

    def draw(self, num_tokens: int, num_heads: int, gain: float = 1.0) -> Tensor:
        shape = (num_tokens, num_heads, self.config.head_dim)
        return (torch.randn(shape, generator=self.g) * gain).to(self._device, self._dtype)

    def share(self, row: int, donor: int, num_pages: int) -> None:
        """A prefix hit: the first pages of a sequence that has not left them."""
        n = num_pages * self.rows.page_tokens
        assert self.rows.page_tables[:, donor, :num_pages].all()
        self.rows.page_tables[:, row, :num_pages] = self.rows.page_tables[:, donor, :num_pages]
        self.rows.num_computed[row] = n
        self.history[row] = tuple([layer[:n] for layer in kv] for kv in self.history[donor])

    def step(self, *work: tuple[int, int], num_decodes: int = 0, padding: int = 0) -> None:
        """work: (row, tokens), decodes first. Every output is held against the oracle's."""
        plan = self._plan(work, num_decodes)
        inputs = self.attention.prepare(plan, self.rows)
        T = plan.num_tokens + padding
        for layer in (SLIDING, GLOBAL):
            q, k = (self.draw(T, n, gain=2.0) for n in (self.config.num_heads, self.config.num_kv_heads))
            self.check(layer, plan, q, self.run(layer, plan, q, k, self.draw(*k.shape[:2]), inputs))
        self.rows.num_computed[plan.rows] += plan.lens
        self._give_back(plan)

    def run(self, layer: int, plan: Plan, q: Tensor, k: Tensor, v: Tensor, inputs: object) -> Tensor:
        """One layer's attention; K and V are remembered."""
        first = 0
        for row, n in zip(plan.rows.tolist(), plan.lens.tolist(), strict=True):
            for past, new in zip(self.history[row], (k, v), strict=True):
                past[layer] = torch.cat([past[layer], new[first : first + n]])
            first += n
        return self.attention.attend(layer, q, k, v, inputs)

    def check(self, layer: int, plan: Plan, q: Tensor, out: Tensor) -> None:
        """Sequence by sequence within the error budget; zeros where nothing is asked."""
        assert out.shape == q.shape
        assert not out[plan.num_tokens :].any()
        first = 0
        for row, n in zip(plan.rows.tolist(), plan.lens.tolist(), strict=True):
            part = slice(first, first + n)
            low, truth = (self.oracle(layer, row, q[part], dtype) for dtype in (self._dtype, torch.float64))
            # fp32: on some CPUs torch's own sums of so few terms come out almost exact
            assert_within_budget(out[part], low, truth, 16.0 if self._dtype == torch.float32 else 2.0)
            first += n

    def oracle(self, layer: int, row: int, q: Tensor, dtype: torch.dtype) -> Tensor:
        """The last len(q) tokens of a sequence over all its K and V, through a mask of (q - W, q]."""
        G = self.config.num_heads // self.config.num_kv_heads
        k, v = (kv[layer].to(dtype).repeat_interleave(G, 1) for kv in self.history[row])
        keys = torch.arange(len(k), device=self._device)
        distance = keys[len(k) - len(q) :, None] - keys
        visible = (distance >= 0) & ((distance < self.config.window) | (layer == GLOBAL))
        scores = torch.einsum("qhd,khd->hqk", q.to(dtype), k) * self.config.attention_scale
        if self.config.attention_softcap is not None:
            scores = torch.tanh(scores / self.config.attention_softcap) * self.config.attention_softcap
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    def _plan(self, work: tuple[tuple[int, int], ...], num_decodes: int) -> Plan:
        rows, lens = (np.array(column, np.int32) for column in zip(*work, strict=True))
        starts = self.rows.num_computed[rows].copy()
        for row, start, end in zip(rows, starts, starts + lens, strict=True):
            for table in self.rows.page_tables:
                for page_idx in range(start // self.rows.page_tokens, -(-end // self.rows.page_tokens)):
                    table[row, page_idx] = table[row, page_idx] or self._free.pop()
        return Plan(rows, starts, lens, np.ones(len(rows), np.bool_), num_decodes)

    def _give_back(self, plan: Plan) -> None:
        """Pages that no later query sees, unless another sequence holds them, as NaN."""
        table = self.rows.page_tables[SLIDING]
        for row in plan.rows:
            behind = max(int(self.rows.num_computed[row]) - self.config.window + 1, 0)
            for page_idx in range(behind // self.rows.page_tokens):
                page, table[row, page_idx] = int(table[row, page_idx]), 0
                if page and page not in self.rows.page_tables:
                    self._free.insert(0, page)
                    for tensor in self._tensors:
                        tensor[page] = torch.nan
