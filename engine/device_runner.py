"""Runs plans on a GPU: rows live there, a step's needs go there in one copy, nothing waits for its tokens.

A step may be launched before the tokens of the one before are known to the host: its token ids come from the
device's rows. Pure decodes replay a graph. Also runs in Triton's interpreter, on CPU tensors, for tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.adapters.triton_deltas import TritonAdapterWeights
from cabochon.engine.attention import Attention
from cabochon.engine.decode_graphs import Capture, DecodeGraphs, Graph
from cabochon.engine.device_rows import DeviceRows
from cabochon.engine.device_sampler import DeviceSampler, last_rows, row_sampling
from cabochon.engine.linear import ROW_MULTIPLE
from cabochon.engine.logprobs import PromptPart, Ranking, prompt_parts
from cabochon.engine.masks import grace_end_s, next_mask
from cabochon.engine.messages import TokenLogprobs
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.packet import Packet, PacketRing
from cabochon.engine.plan import Plan, PromptLogprobs, StepResult
from cabochon.engine.request import Request
from cabochon.engine.rows import NO_ADAPTER, Rows
from cabochon.engine.runner import StepRunner
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.streams import Stream
from cabochon.kernels.definitions import softcap_
from cabochon.kernels.sampling_state import RowSampling

RANKED_ROWS = 64  # rows of logits in fp32 at once: 64 × 262,144 are 67 MB, and log probabilities need a few
LOGPROBS, PROMPT_LOGPROBS, MASKS = 1, 2, 4  # what a row may want beside its token


@dataclass(slots=True)
class _Step:
    """What becomes of a plan: some of it known at launch, the rest put here by the step's work."""

    plan: Plan
    sampling: NDArray[np.intp]  # [R], rows that sample
    parts: list[PromptPart]
    wanting: dict[int, Request]  # by row, those that want more than a token: rows change hands
    late: list[int] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)
    tokens: Tensor | None = None  # [R] int32
    ranked: list[int] = field(default_factory=list)  # indices into `sampling`
    rankings: list[Ranking] = field(default_factory=list)  # of the ranked, in pieces
    prompts: list[list[Ranking]] = field(default_factory=list)  # of `parts`, in pieces


class DeviceRunner(StepRunner):
    """`launch` returns at once; results come in the order of the launches."""

    def __init__(
        self,
        model: Gemma,
        attention: Attention[Any],
        rows: Rows,
        stream: Stream,
        *,
        depth: int,
        adapters: TritonAdapterWeights | None = None,
    ) -> None:
        """depth: steps on the stream at once, at most."""
        device = model.embedding.device
        self._model = model
        self._attention = attention
        self._adapters = adapters
        self._stream = stream
        self._rows = DeviceRows(rows, model.config.vocab_size, device)
        self._packets = PacketRing(stream, device, depth + 1)  # one with a grammar takes two
        self._sampler = DeviceSampler(model, self._rows, rows.max_seqs)
        self._requests: dict[int, Request] = {}
        self._wants: NDArray[np.uint8] = np.zeros(rows.max_seqs, np.uint8)  # so that most rows cost nothing
        self.graphs: DecodeGraphs | None = None

    def add_graphs(self, sizes: list[int], capture: Capture) -> None:
        """Pure decodes of up to max(sizes) rows become graphs, captured one by one by get_ready."""
        self.graphs = DecodeGraphs(
            self._model, self._attention, self._rows, self._sampler, sizes=sizes, capture=capture,
            adapters=self._adapters,
        )  # fmt: skip

    def admit(self, request: Request) -> None:
        assert request.row is not None
        self._requests[request.row] = request
        params = request.message.params
        self._wants[request.row] = (
            (params.logprobs is not None) * LOGPROBS
            | (params.prompt_logprobs is not None) * PROMPT_LOGPROBS
            | (params.grammar is not None) * MASKS
        )
        num_prompt = len(request.message.prompt_ids)
        self._rows.stage_row(request.row, request.token_ids, num_prompt, row_sampling(request))

    @torch.inference_mode()
    def put_adapter(self, slot: int, adapter: Adapter | None) -> None:
        weights = self._adapters
        assert weights is not None
        self._stream.run(lambda: weights.put(slot, adapter))  # behind the steps that use the slot still

    @property
    def num_unprepared(self) -> int:
        return 0 if self.graphs is None else self.graphs.num_missing

    def get_ready(self) -> None:
        if self.graphs is not None:
            self.graphs.capture_next()

    @torch.inference_mode()
    def launch(self, plan: Plan, rows: Rows) -> Callable[[], StepResult]:
        self._rows.stage_pages(plan, rows)
        sampling, wants = plan.rows[plan.samples], self._wants[plan.rows]
        step = _Step(plan, sampling, [], {})
        if np.count_nonzero(wants):
            if np.count_nonzero(wants & PROMPT_LOGPROBS):
                step.parts = prompt_parts(plan, rows, lambda row: bool(self._wants[row] & PROMPT_LOGPROBS))
            wants = wants[plan.samples]
            step.wanting = {row: self._requests[row] for row in sampling[wants != 0].tolist()}
            step.ranked = np.flatnonzero(wants & LOGPROBS).tolist()
            if np.count_nonzero(wants & MASKS):
                return self._result_of(step, self._launch_masked(step, rows))
        is_plain = plan.num_decodes == len(plan.rows) and not step.ranked and not step.parts
        if is_plain and self.graphs is not None:
            slots = rows.adapter_slots[plan.rows]
            has_adapters = bool(np.count_nonzero(slots != NO_ADAPTER))
            graph = self.graphs.find(len(plan.rows), has_adapters=has_adapters)
            if graph is not None:
                return self._result_of(step, self._replay(step, graph, slots))
        return self._result_of(step, self._launch_eager(step, rows))

    @torch.inference_mode()
    def last_logits(self, row: int, rows: Rows) -> Tensor:
        length = rows.num_tokens[row : row + 1]
        self._rows.stage_row(row, rows.known(row), int(length[0]), RowSampling())
        one = np.array([row])
        plan = Plan(one, np.zeros(1, np.int32), length, np.ones(1, np.bool_), num_decodes=0)
        self._rows.stage_pages(plan, rows)
        packet = self._packets.open()
        forward = self._forward(plan, rows, packet)
        last = packet.put(np.array([int(length[0]) - 1]))
        send = self._sender(packet)

        def work() -> Tensor:
            send()
            return self._model.logits(last_rows(forward(), last, ROW_MULTIPLE))[0].float()

        logits = self._stream.run(work)()
        cap = self._model.config.final_softcap
        return logits if cap is None else softcap_(logits, cap)

    def _params(self, row: int) -> SamplingParams:
        return self._requests[row].message.params

    # Launches

    def _launch_eager(self, step: _Step, rows: Rows) -> Callable[[], None]:
        packet = self._packets.open()
        forward = self._forward(step.plan, rows, packet)
        choose = self._chooser(step, step.sampling.astype(np.int32), packet)
        send = self._sender(packet)

        def work() -> None:
            send()
            choose(forward())

        return self._stream.run(work)

    def _launch_masked(self, step: _Step, rows: Rows) -> Callable[[], None]:
        """Grammars have the time of the forward pass for their masks."""
        packet = self._packets.open()
        forward, send = self._forward(step.plan, rows, packet), self._sender(packet)
        hidden: list[Tensor] = []

        def compute() -> None:
            send()
            hidden.append(forward())

        self._stream.run(compute)
        row_ids = self._stage_masks(step, rows)
        packet = self._packets.open()
        choose, send_masks = self._chooser(step, row_ids, packet), self._sender(packet)

        def work() -> None:
            send_masks()
            choose(hidden[0])

        return self._stream.run(work)

    def _replay(self, step: _Step, graph: Graph, slots: NDArray[np.int32]) -> Callable[[], None]:
        num_rows, size = len(step.plan.rows), len(graph.row_ids)
        packet = self._packets.open()
        padded = np.full(size, -1, np.int32)  # np.pad takes ten times as long
        padded[:num_rows] = step.plan.rows
        row_ids, tiles = packet.put(padded), None
        if graph.tiles is not None:
            assert self._adapters is not None
            tiles = packet.put(self._adapters.decode_tiles(slots, len(graph.tiles)))
        send = self._sender(packet)

        def work() -> None:
            send()
            graph.row_ids.copy_(row_ids)
            if graph.tiles is not None and tiles is not None:
                graph.tiles.copy_(tiles)
            graph.replay()
            step.tokens = self._stream.to_host(graph.tokens[:num_rows])

        return self._stream.run(work)

    # Parts of a step's work: what they need of the host is put into the packet here and now

    def _sender(self, packet: Packet) -> Callable[[], None]:
        writes = self._rows.put_writes(packet)

        def send() -> None:
            packet.send()
            self._rows.apply(writes)

        return send

    def _forward(self, plan: Plan, rows: Rows, packet: Packet) -> Callable[[], Tensor]:
        """To the hidden rows [T', E] of all tokens, before the final norm."""
        inputs = self._attention.prepare(plan, rows, packet.put)
        row_of_token = packet.put(np.repeat(plan.rows, plan.lens))
        padding = -plan.num_tokens % ROW_MULTIPLE
        deltas = None
        if self._adapters is not None:
            slots = rows.adapter_slots[plan.rows]
            deltas = self._adapters.step(slots, plan.lens, plan.num_tokens + padding, packet.put)

        def forward() -> Tensor:
            token_ids = self._rows.token_ids[row_of_token, inputs.positions].long()  # [T]
            padded = torch.nn.functional.pad(token_ids, (0, padding))
            return self._model.hidden(padded, inputs, self._attention, deltas)

        return forward

    def _chooser(self, step: _Step, row_ids: NDArray[np.int32], packet: Packet) -> Callable[[Tensor], None]:
        """From hidden rows to what the step gives. row_ids: [R], −1 where a grammar gives no token."""
        plan = step.plan
        last = packet.put((np.cumsum(plan.lens, dtype=np.int64) - 1)[plan.samples])
        ids_on_device = packet.put(row_ids)
        ranked = packet.put(np.array(step.ranked, np.int64)) if step.ranked else None
        count = max((self._params(int(step.sampling[i])).logprobs or 0 for i in step.ranked), default=0)
        prompts = [packet.put(part.next_ids) for part in step.parts]
        prompt_counts = {part.row: self._params(part.row).prompt_logprobs or 0 for part in step.parts}

        def choose(hidden: Tensor) -> None:
            for part, next_ids in zip(step.parts, prompts, strict=True):
                index = torch.arange(part.first, part.first + len(next_ids), device=hidden.device)
                step.prompts.append(self._rank(hidden, index, next_ids, prompt_counts[part.row]))
            if not len(row_ids):
                return
            picked = last_rows(hidden, last, ROW_MULTIPLE)
            tokens = self._sampler.choose(picked, ids_on_device)
            if ranked is not None:
                step.rankings = self._rank(picked, ranked, tokens[ranked], count)
            step.tokens = self._stream.to_host(tokens)

        return choose

    def _rank(self, hidden: Tensor, index: Tensor, token_ids: Tensor, count: int) -> list[Ranking]:
        """Of some rows of hidden: [T', E]; index, token_ids: [R]. In pieces: fp32 [R, V] is never whole."""
        pieces = []
        for start in range(0, len(token_ids), RANKED_ROWS):
            piece = slice(start, start + RANKED_ROWS)
            some = last_rows(hidden, index[piece], ROW_MULTIPLE)
            ranking = self._sampler.rank(some, token_ids[piece], count)
            pieces.append(Ranking(*map(self._stream.to_host, ranking)))
        return pieces

    def _stage_masks(self, step: _Step, rows: Rows) -> NDArray[np.int32]:
        """Returns `sampling` with −1 for rows whose grammar gives no token now."""
        row_ids, until_s = step.sampling.astype(np.int32), grace_end_s()
        for index, row in enumerate(step.sampling.tolist()):
            request = self._requests[row]
            if request.matcher is None:
                continue
            is_free = rows.num_tokens[row] - rows.num_prompt[row] >= self._params(row).min_tokens
            mask = next_mask(request.matcher, until_s, () if is_free else request.stop_ids)
            if isinstance(mask, str):
                (step.late if mask == "late" else step.stuck).append(row)
                row_ids[index] = -1
            else:
                self._rows.stage_mask(row, mask)
        return row_ids

    # Results

    def _result_of(self, step: _Step, wait: Callable[[], None]) -> Callable[[], StepResult]:
        def finish() -> StepResult:
            wait()
            tokens = np.empty(0, np.int32) if step.tokens is None else step.tokens.numpy()
            absent, is_finite = {*step.late, *step.stuck}, tokens >= 0
            if absent:
                is_finite |= np.isin(step.sampling, list(absent))
            bound = {
                row: int(tokens[step.sampling == row][0])
                for row, request in step.wanting.items()
                if request.matcher is not None and row not in absent
            }
            return StepResult(
                np.maximum(tokens, 0), is_finite, _logprobs(step), _prompts(step),
                {row: token for row, token in bound.items() if token >= 0}, step.late, step.stuck,
            )  # fmt: skip

        return finish


def _logprobs(step: _Step) -> dict[int, TokenLogprobs]:
    found: dict[int, TokenLogprobs] = {}
    rows = [one for ranking in step.rankings for one in ranking.rows()]
    for index, one in zip(step.ranked, rows, strict=True):
        row = int(step.sampling[index])
        count = step.wanting[row].message.params.logprobs or 0
        del one.top_ids[count:], one.top_logprobs[count:]
        found[row] = one
    return found


def _prompts(step: _Step) -> dict[int, PromptLogprobs]:
    return {
        part.row: PromptLogprobs(part.start, [one for ranking in pieces for one in ranking.rows()])
        for part, pieces in zip(step.parts, step.prompts, strict=True)
    }
