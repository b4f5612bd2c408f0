"""Runs one plan on the device: inputs from the rows, forward, logits of the rows that sample, sampler.

Knows nothing of requests, queues or who owns a page.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.adapters.deltas import AdapterWeights
from cabochon.engine.attention import Attention, positions_of
from cabochon.engine.logprobs import ExactLogits, prompt_parts, token_logprobs
from cabochon.engine.messages import TokenLogprobs
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.plan import Plan, PromptLogprobs, StepResult
from cabochon.engine.request import Request
from cabochon.engine.rows import Rows
from cabochon.engine.sampler import Sampler
from cabochon.kernels.definitions import softcap_

Value = TypeVar("Value")

LOGITS_ROWS = 64  # rows of logits at once: 64 × 262,144 in bf16 are 34 MB


class StepRunner(ABC):
    """What the core asks of a runner."""

    @abstractmethod
    def admit(self, request: Request) -> None:
        """A request has got its row."""

    @abstractmethod
    def put_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Fill a slot, or empty it, for the steps that are launched from now on."""

    @abstractmethod
    def launch(self, plan: Plan, rows: Rows) -> Callable[[], StepResult]:
        """Start the plan. Returns what waits for its results. `rows` may change as soon as this returns.

        Results have one token per True of plan.samples, in order.
        """

    @property
    def num_unprepared(self) -> int:
        """Pieces of work that would make later steps faster."""
        return 0

    def get_ready(self) -> None:
        """While idle: do one of them, if there is one."""
        assert not self.num_unprepared

    @abstractmethod
    def last_logits(self, row: int, rows: Rows) -> Tensor:
        """[V] fp32, softcapped: all known tokens of one row in a single chunk. Only while idle."""


class Runner(StepRunner):
    """Synchronous: `launch` returns when the tokens are known. For the CPU, where nothing else could run."""

    def __init__(
        self,
        model: Gemma,
        attention: Attention[Any],
        sampler: Sampler,
        adapters: AdapterWeights | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._adapters = adapters
        self._row_multiple = max(model.row_multiple, 1 if adapters is None else adapters.row_multiple)
        self.sampler = sampler

    def admit(self, request: Request) -> None:
        self.sampler.set_row(request)

    @torch.inference_mode()
    def put_adapter(self, slot: int, adapter: Adapter | None) -> None:
        assert self._adapters is not None
        self._adapters.put(slot, adapter)

    def launch(self, plan: Plan, rows: Rows) -> Callable[[], StepResult]:
        result = self.run(plan, rows)
        return lambda: result

    @torch.inference_mode()
    def run(self, plan: Plan, rows: Rows) -> StepResult:
        """Compute the plan."""
        hidden = self._hidden(plan, rows)  # [T', E]
        prompts = self._prompt_logprobs(hidden, plan, rows)
        sampling = plan.rows[plan.samples]
        last = _last_rows(hidden, plan)
        parts = [
            self._sample(last[start : start + LOGITS_ROWS], sampling[start : start + LOGITS_ROWS], rows)
            for start in range(0, len(sampling), LOGITS_ROWS)
        ]
        return StepResult(
            np.concatenate([np.empty(0, np.int32), *(part.token_ids for part in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(part.is_finite for part in parts)]),
            _merged(part.logprobs for part in parts),
            prompts,
            _merged(part.bound for part in parts),
            [row for part in parts for row in part.late],
            [row for part in parts for row in part.stuck],
        )

    @torch.inference_mode()
    def last_logits(self, row: int, rows: Rows) -> Tensor:
        length = rows.num_tokens[row : row + 1]
        one = np.array([row])
        plan = Plan(one, np.zeros(1, np.int32), length, np.ones(1, np.bool_), num_decodes=0)
        logits = self.logits(self.sampling_hidden(plan, rows))[0].float()
        cap = self._model.config.final_softcap
        return logits if cap is None else softcap_(logits, cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, E]. Returns [R, V], not softcapped."""
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, -len(hidden) % self._model.row_multiple))
        return self._model.logits(padded)[: len(hidden)]

    def sampling_hidden(self, plan: Plan, rows: Rows) -> Tensor:
        """[R, E], the hidden rows whose next token is sampled."""
        return _last_rows(self._hidden(plan, rows), plan)

    def _hidden(self, plan: Plan, rows: Rows) -> Tensor:
        """[T', E], every token of the plan, before the final norm."""
        inputs = self._attention.prepare(plan, rows)
        token_ids = rows.token_ids[np.repeat(plan.rows, plan.lens), positions_of(plan)].astype(np.int64)
        padded = np.pad(token_ids, (0, -len(token_ids) % self._row_multiple))
        moved = torch.from_numpy(padded).to(inputs.positions.device)
        deltas = None
        if self._adapters is not None:
            deltas = self._adapters.step(rows.adapter_slots[plan.rows], plan.lens, len(padded))
        return self._model.hidden(moved, inputs, self._attention, deltas)

    def _prompt_logprobs(self, hidden: Tensor, plan: Plan, rows: Rows) -> dict[int, PromptLogprobs]:
        """In pieces of rows: [T, V] is never whole."""
        found: dict[int, PromptLogprobs] = {}
        for part in prompt_parts(plan, rows, lambda row: self.sampler.prompt_logprobs(row) is not None):
            count = self.sampler.prompt_logprobs(part.row) or 0
            found[part.row] = PromptLogprobs(part.start, [])
            for done in range(0, len(part.next_ids), LOGITS_ROWS):
                ids = torch.from_numpy(part.next_ids[done : done + LOGITS_ROWS].astype(np.int64))
                some = hidden[part.first + done :][: len(ids)]
                found[part.row].logprobs.extend(self._logprobs(some, ids.to(hidden.device), count))
        return found

    def _logprobs(self, hidden: Tensor, token_ids: Tensor, count: int) -> list[TokenLogprobs]:
        logits = self.logits(hidden)
        exact = self._exact(hidden, logits)
        cap = self._model.config.final_softcap
        return token_logprobs(logits.float(), token_ids, count, cap, exact).rows()

    def _sample(self, hidden: Tensor, sampling: NDArray[np.intp], rows: Rows) -> StepResult:
        draws = self.sampler.draws(sampling, rows)
        told = None if draws is None else self._model.next_tokens(hidden, draws)
        if told is None:
            return self._sample_logits(hidden, sampling, rows)
        left = [index for index, token_id in enumerate(told) if token_id is None]
        token_ids = np.array([0 if token_id is None else token_id for token_id in told], np.int32)
        is_finite = np.ones(len(told), np.bool_)
        if not left:
            return StepResult(token_ids, is_finite)
        found = self._sample_logits(hidden[left], sampling[left], rows)
        token_ids[left], is_finite[left] = found.token_ids, found.is_finite
        return replace(found, token_ids=token_ids, is_finite=is_finite)

    def _sample_logits(self, hidden: Tensor, sampling: NDArray[np.intp], rows: Rows) -> StepResult:
        logits = self.logits(hidden)
        exact, slack = self._exact(hidden, logits), self._model.slack(hidden)
        return self.sampler.sample(logits, sampling, rows, exact, slack)

    def _exact(self, hidden: Tensor, logits: Tensor) -> ExactLogits | None:
        """What settles ties and gives reported values, if the logits are rounded."""
        if logits.dtype == torch.float32:
            return None
        return lambda row_idx, ids: self._model.exact_logits(hidden.index_select(0, row_idx), ids)


def _last_rows(hidden: Tensor, plan: Plan) -> Tensor:
    last = torch.from_numpy((np.cumsum(plan.lens) - 1)[plan.samples])
    return hidden.index_select(0, last.to(hidden.device))  # [R, E]


def _merged(parts: Iterable[dict[int, Value]]) -> dict[int, Value]:
    return {row: value for part in parts for row, value in part.items()}
