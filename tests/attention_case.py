"""Ragged sequences over scattered pages, for tests of attention kernels; NaN wherever none may look."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.paged_attention import paged_attention_reference

E4M3 = torch.float8_e4m3fn


class AttentionCase:
    """Sequences of (keys, queries). What no query sees, and pages of no sequence, are NaN for the kernel.

    `clean` has zeros there: the definition reads page 0 for keys that are not seen.
    """

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        *,
        window: int | None = None,
        softcap: float | None = 50.0,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        heads: tuple[int, int] = (2, 1),
        dim: int = 16,
        page_tokens: int = 4,
        gain: float = 4.0,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        Hq, Hkv = heads
        P, self.dtype = page_tokens, dtype
        self.window, self.softcap, self.scale = window, softcap, dim**-0.5
        M = max([-(-keys // P) for keys, _ in sequences], default=1) + 1
        N = len(sequences) * M + 4
        numbers = (torch.randperm(N - 1, generator=g) + 1)[: len(sequences) * M]
        self.page_table = numbers.view(-1, M).to(torch.int32)
        shape = (N, P, Hkv, dim)
        self.k = torch.randn(shape, generator=g) * gain
        self.v = torch.randn(shape, generator=g)
        self.scales: dict[str, Tensor] = {}
        if kv_dtype == E4M3:
            self.scales = {f"{name}_scales": torch.rand(shape[:3], generator=g) + 0.1 for name in ("k", "v")}
        self.k, self.v = self.k.to(kv_dtype or dtype), self.v.to(kv_dtype or dtype)
        self.seq_lens = torch.tensor([keys for keys, _ in sequences], dtype=torch.int32)
        lens = torch.tensor([0, *(queries for _, queries in sequences)])
        self.cu_seqlens_q = lens.cumsum(0).to(torch.int32)
        self.q = torch.randn((int(lens.sum()), Hq, dim), generator=g).to(dtype) * 2
        self._hide(sequences, N, P)

    def _hide(self, sequences: list[tuple[int, int]], N: int, P: int) -> None:
        """Null pages where a window has left, as the cache does, and NaN in all that is not seen."""
        seen = torch.zeros(N, P, dtype=torch.bool)
        for row, (keys, queries) in zip(self.page_table, sequences, strict=True):
            first = 0 if self.window is None else max(keys - queries - self.window + 1, 0)
            row[: first // P] = 0
            for key in range(first, keys):
                seen[row[key // P], key % P] = True
        self.k_nan, self.v_nan = self.k.clone(), self.v.clone()
        for pages, poisoned in ((self.k, self.k_nan), (self.v, self.v_nan)):
            pages.view(torch.uint8)[~seen] = 0
            poisoned.view(torch.uint8)[~seen] = 0x7F if poisoned.dtype == E4M3 else 0xFF  # NaN in any float
        for name, scales in self.scales.items():
            self.scales[name] = torch.where(seen[..., None], scales, torch.nan)

    @property
    def softmax(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "window": self.window}

    def reference(self, dtype: torch.dtype) -> Tensor:
        """The definition in `dtype`, or in fp64."""
        k, v, scales = self.k, self.v, {k: s.nan_to_num(0.0) for k, s in self.scales.items()}
        if not scales:
            k, v = k.to(dtype), v.to(dtype)
        return paged_attention_reference(
            self.q.to(dtype),
            k,
            v,
            self.page_table,
            self.cu_seqlens_q,
            self.seq_lens,
            **scales,
            **self.softmax,
        )

    def assert_within_budget(self, out: Tensor) -> None:
        """Sequence by sequence: a short one has larger outputs, which would excuse a long one's errors.

        fp32 is there to show wrong keys, masks and merges. Its budget is wider: the kernel's tanh is wrong by
        eps at any size, torch's by eps of the result, and one row's largest error is a matter of luck.
        """
        truth, low = self.reference(torch.float64), self.reference(self.dtype)
        factor = 16.0 if self.dtype == torch.float32 else 2.0  # torch's own fp32 is almost exact on some CPUs
        bounds = self.cu_seqlens_q.tolist()
        for start, end in pairwise(bounds):
            if end > start:
                rows = slice(start, end)
                assert_within_budget(out[rows], low[rows], truth[rows], factor)
