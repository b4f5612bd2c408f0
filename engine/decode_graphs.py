"""Decode steps as CUDA graphs: one launch instead of hundreds, for a few numbers of rows.

A graph computes `size` rows; those it has too many are padding with row id −1. All sizes share their memory.
Where there are adapters, each size has a second graph that adds them.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.engine.adapters.triton_deltas import TritonAdapterWeights
from cabochon.engine.attention import Attention
from cabochon.engine.device_rows import DeviceRows
from cabochon.engine.device_sampler import DeviceSampler
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.pages_attention import PagesInputs
from cabochon.kernels.prepare_inputs import DecodeInputs, decode_inputs, prepare_decodes

LARGEST = 256  # rows: beyond, the launches of a step cost little beside its work

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]  # what is to be done -> what does it again


def graph_sizes(max_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8, of 16 from 64 on; the last holds max_seqs rows, but 256 at most."""
    wanted = min(max_seqs, LARGEST)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, LARGEST + 16, 16)]
    last = next(i for i, size in enumerate(sizes) if size >= wanted)
    return sizes[: last + 1]


def capture_cuda() -> Capture:
    """Captures into graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Replay) -> Replay:
        work()  # compiles kernels and lets cuBLAS choose, which no capture may contain
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph.replay

    return capture


@dataclass(frozen=True, slots=True)
class Graph:
    """Buffers of one size, and what fills `tokens` from `row_ids`.

    A graph knows addresses alone: what it reads and was not allocated in it must be kept, as here.
    """

    row_ids: Tensor  # [size] int32
    tokens: Tensor  # [size] int32
    tiles: Tensor | None  # [n, 3] int32, of their adapters, if it adds any
    inputs: DecodeInputs
    replay: Replay


class DecodeGraphs:
    """Captured largest first, one per `capture_next`, so that a server is ready before they are."""

    def __init__(
        self,
        model: Gemma,
        attention: Attention[Any],
        rows: DeviceRows,
        sampler: DeviceSampler,
        *,
        sizes: list[int],
        capture: Capture,
        adapters: TritonAdapterWeights | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._rows = rows
        self._sampler = sampler
        self._capture = capture
        self._adapters = adapters
        kinds = [False] if adapters is None else [True, False]  # with adapters or without, which come first
        self._missing = [(size, kind) for kind in kinds for size in sorted(sizes)]
        self._graphs: dict[tuple[int, bool], Graph] = {}

    def find(self, num_rows: int, *, has_adapters: bool) -> Graph | None:
        """The smallest captured step that holds num_rows."""
        sizes = (size for size, kind in self._graphs if size >= num_rows and kind == has_adapters)
        size = min(sizes, default=None)
        return None if size is None else self._graphs[size, has_adapters]

    @property
    def num_missing(self) -> int:
        return len(self._missing)

    def capture_next(self) -> None:
        """Capture the largest that is missing, if any. Only while no step runs."""
        if not self._missing:
            return
        size, has_adapters = self._missing.pop()
        try:
            self._graphs[size, has_adapters] = self._captured(size, has_adapters)
        except RuntimeError as error:  # no memory, in torch or in the driver: such steps stay eager
            logger.warning(
                "decode graphs=%d missing=%d reason=%s",
                len(self._graphs),
                len(self._missing) + 1,
                type(error).__name__,
            )
            self._missing.clear()
        if not self._missing:
            largest = max((size for size, _ in self._graphs), default=0)
            logger.info("decode graphs=%d largest=%d", len(self._graphs), largest)

    @torch.inference_mode()
    def _captured(self, size: int, has_adapters: bool) -> Graph:
        rows, device = self._rows, self._rows.num_tokens.device
        row_ids = torch.full((size,), -1, dtype=torch.int32, device=device)  # padding: changes no row
        tokens = torch.empty_like(row_ids)
        num_groups, _, width = rows.page_tables.shape
        buffers = decode_inputs(size, num_groups, width, device)
        inputs = _static_inputs(buffers)
        tiles = deltas = None
        if has_adapters:
            assert self._adapters is not None
            tiles = torch.full(
                (self._adapters.max_decode_tiles(size), 3), -1, dtype=torch.int32, device=device
            )
            deltas = self._adapters.of_tiles(tiles)

        def work() -> None:
            prepare_decodes(
                row_ids, rows.token_ids, rows.num_tokens, rows.page_tables, rows.page_tokens, out=buffers
            )
            hidden = self._model.hidden(buffers.token_ids, inputs, self._attention, deltas)
            tokens.copy_(self._sampler.choose(hidden, row_ids))

        return Graph(row_ids, tokens, tiles, buffers, self._capture(work))


def _static_inputs(buffers: DecodeInputs) -> PagesInputs:
    return PagesInputs(
        positions=buffers.positions,
        slots=list(buffers.slots),
        page_tables=list(buffers.page_tables),
        seq_lens=buffers.seq_lens,
        cu_seqlens_q=buffers.seq_lens[:0],  # no prefills
        num_decodes=len(buffers.seq_lens),
    )
