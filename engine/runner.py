"""Runs one plan on the device: inputs from the rows, forward, logits of the rows that sample, sampler.

Knows nothing of requests, queues or who owns a page.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.attention import TorchAttention
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.linear import ROW_MULTIPLE
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.engine.sampler import Sampled, Sampler
from cabochon.kernels.definitions import softcap_

LOGITS_ROWS = 64  # rows of logits at once: 64 × 262,144 in bf16 are 34 MB


class Runner:
    """Synchronous (depth 1): `run` returns when the tokens are known."""

    def __init__(self, model: Gemma, pages: KVPages, sampler: Sampler) -> None:
        self._model = model
        self._attention = TorchAttention(model.config, pages)
        self.sampler = sampler

    @torch.inference_mode()
    def run(self, plan: Plan, rows: Rows) -> Sampled:
        """Compute the plan. Returns one token per True of plan.samples, in order."""
        sampling = plan.rows[plan.samples]
        hidden = self.sampling_hidden(plan, rows)
        parts = [
            self._sample(hidden[start : start + LOGITS_ROWS], sampling[start : start + LOGITS_ROWS], rows)
            for start in range(0, len(sampling), LOGITS_ROWS)
        ]
        return Sampled(
            np.concatenate([np.empty(0, np.int32), *(part.token_ids for part in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(part.is_finite for part in parts)]),
        )

    def sampling_hidden(self, plan: Plan, rows: Rows) -> Tensor:
        """[R, E], the hidden rows whose next token is sampled."""
        inputs = self._attention.prepare(plan, rows)
        positions = inputs.positions.numpy()
        token_ids = rows.token_ids[np.repeat(plan.rows, plan.lens), positions].astype(np.int64)
        padded = np.pad(token_ids, (0, -len(token_ids) % ROW_MULTIPLE))
        hidden = self._model.hidden(torch.from_numpy(padded), inputs, self._attention)  # [T', E]
        last = (np.cumsum(plan.lens) - 1)[plan.samples]
        return hidden.index_select(0, torch.from_numpy(last))

    @torch.inference_mode()
    def last_logits(self, row: int, rows: Rows) -> Tensor:
        """[V] fp32, softcapped: all known tokens of one row in a single chunk."""
        length = rows.num_tokens[row : row + 1]
        one = np.array([row], np.int32)
        plan = Plan(one, np.zeros(1, np.int32), length, np.ones(1, np.bool_), num_decodes=0)
        logits = self.logits(self.sampling_hidden(plan, rows))[0].float()
        cap = self._model.config.final_softcap
        return logits if cap is None else softcap_(logits, cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, E]. Returns [R, V], not softcapped."""
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, -len(hidden) % ROW_MULTIPLE))
        return self._model.logits(padded)[: len(hidden)]

    def _sample(self, hidden: Tensor, sampling: NDArray[np.int32], rows: Rows) -> Sampled:
        logits = self.logits(hidden)

        def exact(row_idx: Tensor, token_ids: Tensor) -> Tensor:
            return self._model.exact_logits(hidden.index_select(0, row_idx), token_ids)

        is_rounded = logits.dtype != torch.float32
        return self.sampler.sample(logits, sampling, rows, exact if is_rounded else None)
