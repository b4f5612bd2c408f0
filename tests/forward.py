"""Drives the forward pass by hand: chosen chunks, chosen pages, no scheduler."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from cabochon.engine.adapters.deltas import AdapterWeights
from cabochon.engine.attention import make_attention
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import FP8, KVPages
from cabochon.engine.linear import Linear, MakeLinear
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.plan import Plan
from cabochon.engine.rows import NO_ADAPTER, Rows


class Forward:
    """A model, NaN-filled pages handed out in random order, and rows to put sequences in."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        model_class: type[Gemma] = Gemma,
        backend: Literal["torch", "triton"] = "torch",
        page_tokens: int = 4,
        max_seqs: int = 8,
        max_len: int = 512,
        seed: int = 0,
        make_linear: MakeLinear = Linear,
        make_head: MakeLinear | None = None,
        adapters: AdapterWeights | None = None,
    ) -> None:
        self.adapters = adapters
        self.model = model_class(
            config, lambda name, shape: weights[name].to(dtype).view(shape), max_len, make_linear, make_head
        )
        kv_dtype = kv_dtype or dtype
        self.layout = kv_layout(config, page_tokens, kv_dtype.itemsize, has_scales=kv_dtype == FP8)
        per_seq = -(-max_len // page_tokens) * self.layout.num_groups
        self.pages = KVPages(config, self.layout, max_seqs * per_seq, kv_dtype, torch.device("cpu"))
        for tensor in (*self.pages.k, *self.pages.v, *self.pages.k_scales, *self.pages.v_scales):
            tensor[1:] = torch.nan  # recycled pages may hold anything; page 0 is the null page
        self.rows = Rows(
            max_seqs=max_seqs,
            max_model_len=max_len,
            num_groups=self.layout.num_groups,
            page_tokens=page_tokens,
        )
        self._free = list(np.random.default_rng(seed).permutation(max_seqs * per_seq) + 1)
        self.attention = make_attention(backend, config, self.pages)

    def add(self, ids: Sequence[int], slot: int = NO_ADAPTER) -> int:
        row = self.rows.take(list(ids), len(ids))
        self.rows.adapter_slots[row] = slot
        return row

    def attach(self, row: int, other: int, num_pages: int) -> None:
        """A prefix hit: the first pages of `other` are computed tokens of `row`, too."""
        for table in self.rows.page_tables:
            table[row, :num_pages] = table[other, :num_pages]
        self.rows.num_computed[row] = num_pages * self.rows.page_tokens

    @torch.inference_mode()
    def step(self, work: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """work: (row, tokens to compute). Returns per row the logits [n, V] of its tokens, not softcapped."""
        decodes = [(row, n) for row, n in work if n == 1 and self.rows.num_computed[row] > 0]
        ordered = [*decodes, *(item for item in work if item not in decodes)]
        row_ids = np.array([row for row, _ in ordered], np.int32)
        lens = np.array([n for _, n in ordered], np.int32)
        starts = self.rows.num_computed[row_ids].copy()
        self._allocate(row_ids, starts + lens)
        plan = Plan(row_ids, starts, lens, np.ones(len(lens), bool), len(decodes))
        inputs = self.attention.prepare(plan, self.rows)
        ids = self.rows.token_ids[np.repeat(row_ids, lens), inputs.positions.numpy()].astype(np.int64)
        padded = torch.from_numpy(np.pad(ids, (0, -len(ids) % 4)))
        deltas = None
        if self.adapters is not None:
            deltas = self.adapters.step(self.rows.adapter_slots[row_ids], lens, len(padded))
        hidden = self.model.hidden(padded, inputs, self.attention, deltas)
        logits = self.model.logits(hidden)[: len(ids)]
        self.rows.num_computed[row_ids] += lens
        by_row = dict(zip(row_ids.tolist(), logits.split(lens.tolist()), strict=True))
        return [by_row[row] for row, _ in work]

    def _allocate(self, row_ids: np.ndarray, ends: np.ndarray) -> None:
        for row, end in zip(row_ids, ends, strict=True):
            for page_idx in range(-(-int(end) // self.rows.page_tokens)):
                for table in self.rows.page_tables:
                    if table[row, page_idx] == 0:
                        table[row, page_idx] = self._free.pop()
