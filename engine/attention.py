"""What a step tells the attention of every layer, and the `torch` backend, for any device.

A backend is two calls: prepare once a step, attend once a layer. The GPU's are in
`triton_attention` and `flash_attention`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.kv_pages import KVPages
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.paged_attention import KEY_TILE, Section, paged_attention, plan_sections


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """positions: [T] int64. slots: per group [T] int64, where K and V go (page · P + offset)."""

    positions: Tensor
    slots: list[Tensor]


Inputs = TypeVar("Inputs", bound=AttentionInputs)
Move = Callable[[NDArray[Any]], Tensor]
Backend = Literal["torch", "native", "triton", "flash-attn"]


class Attention(ABC, Generic[Inputs]):
    """Writes the step's K and V into pages, then attends through them: chunks, hits and decodes alike."""

    @abstractmethod
    def prepare(self, plan: Plan, rows: Rows, move: Move | None = None) -> Inputs:
        """All index work of the step; nothing per layer. Page tables must cover starts + lens.

        move: gives an array's place on the device; None: copies it there, one by one.
        """

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """q: [T', Hq, D]. k, v: [T', Hkv, D]. T' ≥ T: rows past T are padding and get zeros.

        Returns [T', Hq, D].
        """


def make_attention(backend: Backend, model: ModelConfig, pages: KVPages) -> Attention[Any]:
    """The backend over these pages."""
    if backend == "torch":
        return TorchAttention(model, pages)
    if backend == "native":
        from cabochon.engine.native_attention import NativeAttention  # a subclass of what is defined here

        return NativeAttention(model, pages)
    if backend == "flash-attn":
        from cabochon.engine.flash_attention import FlashAttention  # flash-attn is an optional package

        return FlashAttention(model, pages)
    from cabochon.engine.triton_attention import (
        TritonAttention,
    )  # triton is optional: a CPU has no use for it

    return TritonAttention(model, pages)


def positions_of(plan: Plan) -> NDArray[np.int64]:
    """[T], the position of each token of the plan."""
    first = np.cumsum(plan.lens) - plan.lens
    positions: NDArray[np.int64] = np.arange(plan.num_tokens) - np.repeat(first - plan.starts, plan.lens)
    return positions


def mover(device: torch.device) -> Move:
    """Copies each array by itself."""
    return lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)


def slots_of(plan: Plan, rows: Rows, positions: NDArray[np.int64], move: Move) -> list[Tensor]:
    """Per group [T] int64, where K and V of each token go."""
    row_of_token = np.repeat(plan.rows, plan.lens)
    page_idx, offsets = np.divmod(positions, rows.page_tokens)
    slots = []
    for table in rows.page_tables:
        pages = table[row_of_token, page_idx].astype(np.int64)
        assert pages.all(), "a token has no page"
        slots.append(move(pages * rows.page_tokens + offsets))
    return slots


def write_kv(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k, v: [T', Hkv, D], of which the first T go to slots [T] of the pages [N, P, Hkv, D]."""
    k_pages.view(-1, *k.shape[1:]).index_copy_(0, slots, k[: len(slots)])
    v_pages.view(-1, *v.shape[1:]).index_copy_(0, slots, v[: len(slots)])


@dataclass(frozen=True, slots=True)
class TorchInputs(AttentionInputs):
    """sections: per group, the gathers of keys and what is masked in them."""

    sections: list[list[Section]]


class TorchAttention(Attention[TorchInputs]):
    """The definition: gathers keys, multiplies, adds tile by tile."""

    def __init__(self, model: ModelConfig, pages: KVPages) -> None:
        self._model = model
        self._pages = pages
        self._device = pages.k[0].device
        self._move = mover(self._device)
        self._key_tile = max(KEY_TILE, pages.layout.page_tokens)

    def prepare(self, plan: Plan, rows: Rows, move: Move | None = None) -> TorchInputs:
        move = move or self._move
        positions = positions_of(plan)
        slots = slots_of(plan, rows, positions, move)
        sections = [
            self._sections(plan, table, rows.page_tokens, window)
            for table, window in zip(rows.page_tables, self._pages.layout.windows, strict=True)
        ]
        return TorchInputs(move(positions), slots, sections)

    def _sections(
        self, plan: Plan, table: NDArray[np.int32], page_tokens: int, window: int | None
    ) -> list[Section]:
        sections = plan_sections(
            plan.starts,
            plan.lens,
            plan.num_decodes,
            table[plan.rows],
            page_tokens=page_tokens,
            num_kv_heads=self._model.num_kv_heads,
            head_dim=self._model.head_dim,
            window=window,
        )
        return sections if self._device.type == "cpu" else [one.to(self._device) for one in sections]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, inputs: TorchInputs) -> Tensor:
        group, k_pages, v_pages, *_ = self._pages.of_layer(layer)
        write_kv(k_pages, v_pages, k, v, inputs.slots[group])
        return paged_attention(
            q,
            k_pages,
            v_pages,
            inputs.sections[group],
            scale=self._model.attention_scale,
            softcap=self._model.attention_softcap,
            key_tile=self._key_tile,
        )
