"""Sampling where the logits are: the kernels' draw, and log probabilities of the rows that want them."""

import torch
from torch import Tensor

from cabochon.engine.device_rows import DeviceRows
from cabochon.engine.logprobs import ExactLogits, Ranking, token_logprobs
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.request import Request
from cabochon.kernels.prepare_inputs import append_tokens
from cabochon.kernels.sample import ExactLogits as KernelExactLogits
from cabochon.kernels.sample import SampleBuffers, sample
from cabochon.kernels.sampling_state import RowSampling, note_tokens

SAMPLED_ROWS = 256  # rows of logits at once: 256 × 262,144 in bf16 are 134 MB


def row_sampling(request: Request) -> RowSampling:
    """The request's parameters in the kernels' words. Log probabilities are not the kernels' here."""
    params = request.message.params
    return RowSampling(
        temperature=0.0 if params.is_greedy else params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        bias=params.logit_bias,
        min_tokens=params.min_tokens,
        stop_ids=request.stop_ids,
        has_grammar=params.grammar is not None,
    )


class DeviceSampler:
    """Chooses tokens and enters them into the rows. Waits for nothing, so a CUDA graph may hold `choose`."""

    def __init__(self, model: Gemma, rows: DeviceRows, max_rows: int) -> None:
        self._model = model
        self._rows = rows
        self._buffers = SampleBuffers(min(max_rows, SAMPLED_ROWS), rows.sampling)

    def choose(self, hidden: Tensor, row_ids: Tensor) -> Tensor:
        """hidden: [R, E], before the final norm. row_ids: [R] int32, −1: no token for this one.

        Returns [R] int32, the tokens; −1 also where the logits are not finite.
        """
        pieces = [
            self._choose(hidden[start : start + SAMPLED_ROWS], row_ids[start : start + SAMPLED_ROWS])
            for start in range(0, len(row_ids), SAMPLED_ROWS)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _choose(self, hidden: Tensor, row_ids: Tensor) -> Tensor:
        normed = self._model.normed(hidden)
        logits = self._model.head(normed)[: len(row_ids)]
        exact = None
        if logits.dtype != torch.float32:  # rounded: ties are settled by exact products
            exact = KernelExactLogits(normed, self._model.embedding)
        rows = self._rows
        tokens = sample(
            logits, row_ids, rows.sampling, rows.num_tokens, rows.num_prompt,
            self._model.config.final_softcap, self._buffers, exact,
        ).token_ids  # fmt: skip
        append_tokens(row_ids, tokens, rows.token_ids, rows.num_tokens)
        note_tokens(row_ids, tokens, rows.sampling)
        return tokens.clone()  # the buffers are the next piece's

    def rank(self, hidden: Tensor, token_ids: Tensor, count: int) -> Ranking:
        """Log probabilities of these tokens. hidden: [R, E]. token_ids: [R] int32, below 0: of token 0."""
        logits = self._model.logits(hidden)[: len(token_ids)]  # hidden may have rows of padding
        exact: ExactLogits | None = None
        if logits.dtype != torch.float32:
            exact = self._exact(hidden)
        ids = token_ids.clamp(min=0).long()
        return token_logprobs(logits.float(), ids, count, self._model.config.final_softcap, exact)

    def _exact(self, hidden: Tensor) -> ExactLogits:
        return lambda row_idx, ids: self._model.exact_logits(hidden.index_select(0, row_idx), ids)


def last_rows(hidden: Tensor, last: Tensor, multiple: int) -> Tensor:
    """hidden: [T', E]. last: [R] int64. Returns [R', E], R' the next multiple, the rest zeros."""
    rows = hidden.index_select(0, last)
    missing = -len(rows) % multiple
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
