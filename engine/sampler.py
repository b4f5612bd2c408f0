"""The next token of each row, from its logits, its parameters and its own tokens alone: no other row enters.

Order: final softcap, bias and penalties, min_tokens, temperature, top-k, top-p and min-p, noise, argmax.
Greedy rows without any of it compare uncapped logits (the cap is monotone, and in bf16 it would make ties).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.logprobs import ExactLogits, token_logprobs
from cabochon.engine.masks import grace_end_s, next_mask
from cabochon.engine.messages import TokenLogprobs
from cabochon.engine.plan import StepResult
from cabochon.engine.request import Request
from cabochon.engine.rows import Rows
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.definitions import softcap_
from cabochon.kernels.native.sampling import Slack, find_largest
from cabochon.kernels.sampling import Draw, draw, gumbel_argmax, penalize_, truncation_threshold


@dataclass(frozen=True, slots=True)
class _Row:
    request: Request
    params: SamplingParams
    stop_ids: Tensor  # [n] int64, banned before min_tokens
    bias_ids: Tensor  # [n] int64
    bias: Tensor  # [n] fp32


class Sampler:
    """Parameters per row, set at admission; all history is in Rows."""

    def __init__(
        self, vocab_size: int, final_softcap: float | None, device: torch.device | None = None
    ) -> None:
        """device: of the logits; None: the CPU."""
        self._device = device or torch.device("cpu")
        self._vocab_size = vocab_size
        self._softcap = final_softcap
        self._rows: dict[int, _Row] = {}
        self._grace_end_s = 0.0  # of this step, for all of its rows together

    def set_row(self, request: Request) -> None:
        """Take the parameters of a request that has just got its row."""
        assert request.row is not None
        params = request.message.params
        self._rows[request.row] = _Row(
            request,
            params,
            torch.tensor(sorted(request.stop_ids), dtype=torch.int64, device=self._device),
            torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self._device),
            torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=self._device),
        )

    def draws(self, row_ids: NDArray[np.intp], rows: Rows) -> list[Draw | None] | None:
        """Their draws if nothing is wanted of any of these rows but a draw, or the largest logit (None)."""
        found: list[Draw | None] = []
        for index, row in enumerate(row_ids.tolist()):
            is_plain = self._is_plain(row, rows)
            if self._rows[row].params.logprobs is not None or not (
                is_plain or self._is_only_drawn(row, rows)
            ):
                return None
            found.append(None if is_plain else self._draw_of(index, row, rows))
        return found

    def sample(
        self,
        logits: Tensor,
        row_ids: NDArray[np.intp],
        rows: Rows,
        exact: ExactLogits | None = None,
        slack: Slack | None = None,
    ) -> StepResult:
        """logits: [R, V] not softcapped, of distinct rows row_ids [R]; those in fp32 are overwritten.

        `exact` settles ties that a rounded dtype made. slack: how far logits are from those of `exact`, from
        which draws are then, too.
        """
        found = find_largest(logits, slack)
        highest, token_ids = found[:2] if found else logits.max(-1)  # NaN wins, so it shows
        plain = [self._is_plain(int(row), rows) for row in row_ids]
        if exact is not None and any(plain):
            lowest = highest if slack is None else slack.below(highest)
            num_tied = found.num_tied if found else (logits >= lowest[:, None]).sum(-1)
            is_tied = ((num_tied > 1) & highest.isfinite()).tolist()
            tied = [i for i, is_one in enumerate(is_tied) if plain[i] and is_one]
            self._settle_ties(logits, lowest, token_ids, tied, exact)
        chosen = token_ids.cpu().numpy().astype(np.int32)
        is_finite = highest.isfinite().cpu().numpy()
        wanted = [i for i, row in enumerate(row_ids.tolist()) if self._rows[row].params.logprobs is not None]
        kept = logits[wanted].float() if wanted else None  # a copy: choosing overwrites
        result = StepResult(chosen, is_finite)
        self._grace_end_s = grace_end_s()
        drawn: list[Draw] = []
        for index, row in enumerate(row_ids.tolist()):
            if not is_finite[index] or plain[index]:
                continue
            if self._is_only_drawn(row, rows):
                drawn.append(self._draw_of(index, row, rows))
            else:
                chosen[index] = self._choose(logits[index].float(), row, rows, result)
        chosen[[each.row for each in drawn]] = draw(logits, drawn, self._softcap, slack, exact)
        if kept is not None:
            result.logprobs.update(self._logprobs(kept, wanted, chosen, row_ids, exact))
        return result

    def prompt_logprobs(self, row: int) -> int | None:
        """How many alternatives the row wants with each prompt token."""
        return self._rows[row].params.prompt_logprobs

    def _logprobs(
        self,
        logits: Tensor,
        indices: list[int],
        chosen: NDArray[np.int32],
        row_ids: NDArray[np.intp],
        exact: ExactLogits | None,
    ) -> dict[int, TokenLogprobs]:
        """logits: [W, V] fp32, of the rows row_ids[indices]."""
        of = torch.tensor(indices, device=self._device)
        shifted = None if exact is None else lambda rows, ids: exact(of[rows], ids)
        counts = [self._rows[int(row_ids[index])].params.logprobs or 0 for index in indices]
        tokens = torch.from_numpy(chosen[indices].astype(np.int64)).to(self._device)
        found = token_logprobs(logits, tokens, max(counts), self._softcap, shifted).rows()
        for one, count in zip(found, counts, strict=True):
            del one.top_ids[count:], one.top_logprobs[count:]
        return {int(row_ids[index]): one for index, one in zip(indices, found, strict=True)}

    def _is_plain(self, row: int, rows: Rows) -> bool:
        return self._rows[row].params.is_greedy and self._is_unbound(row, rows)

    def _is_only_drawn(self, row: int, rows: Rows) -> bool:
        """Whether the row's token is a draw from its logits as they are, but for cap and temperature."""
        params = self._rows[row].params
        is_whole = not (params.top_k or params.top_p < 1 or params.min_p)
        return is_whole and not params.is_greedy and self._is_unbound(row, rows)

    def _draw_of(self, index: int, row: int, rows: Rows) -> Draw:
        params = self._rows[row].params
        return Draw(index, params.temperature, params.seed, int(rows.num_tokens[row]))

    def _is_unbound(self, row: int, rows: Rows) -> bool:
        params = self._rows[row].params
        is_free = rows.num_tokens[row] - rows.num_prompt[row] >= params.min_tokens
        return bool(is_free) and not (params.has_penalties or params.logit_bias or params.grammar is not None)

    def _settle_ties(
        self, logits: Tensor, lowest: Tensor, token_ids: Tensor, tied: list[int], exact: ExactLogits
    ) -> None:
        """Among tokens from `lowest` on, take the largest fp32 logit, then the lowest id."""
        if not tied:
            return
        indices = torch.tensor(tied, device=self._device)
        row_of, ids = (logits[indices] >= lowest[indices, None]).nonzero(as_tuple=True)  # by row, ascending
        row_of = indices[row_of]
        values = exact(row_of, ids)
        for row in tied:
            mine = row_of == row
            token_ids[row] = ids[mine][values[mine].argmax()]

    def _choose(self, logits: Tensor, row: int, rows: Rows, result: StepResult) -> int:
        """logits: [V] fp32, uncapped, ours to overwrite. Notes in `result` what became of a grammar."""
        state = self._rows[row]
        params = state.params
        matcher = state.request.matcher
        if matcher is None:
            return self._draw(logits, row, rows)
        is_free = rows.num_tokens[row] - rows.num_prompt[row] >= params.min_tokens
        mask = next_mask(matcher, self._grace_end_s, () if is_free else state.request.stop_ids)
        if isinstance(mask, str):
            (result.late if mask == "late" else result.stuck).append(row)
            return 0
        allowed = torch.from_numpy(mask).to(self._device)
        result.bound[row] = self._draw(logits, row, rows, allowed)
        return result.bound[row]

    def _draw(self, logits: Tensor, row: int, rows: Rows, allowed: Tensor | None = None) -> int:
        state = self._rows[row]
        params = state.params
        if self._softcap is not None:
            logits = softcap_(logits, self._softcap)
        if len(state.bias_ids):
            logits[state.bias_ids] += state.bias
        if params.has_penalties:
            _penalize(logits, row, rows, params)
        if rows.num_tokens[row] - rows.num_prompt[row] < params.min_tokens:
            logits[state.stop_ids] = -torch.inf
        if allowed is not None:
            logits.masked_fill_(~allowed, -torch.inf)
        if params.is_greedy:
            return int(logits.argmax())
        scaled = logits.div_(params.temperature)
        if params.top_k or params.top_p < 1 or params.min_p:
            threshold = truncation_threshold(
                scaled, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
            )
            scaled.masked_fill_(scaled < threshold, -torch.inf)
        return gumbel_argmax(scaled, params.seed, int(rows.num_tokens[row]))


def _penalize(logits: Tensor, row: int, rows: Rows, params: SamplingParams) -> None:
    known = rows.token_ids[row, : rows.num_tokens[row]]
    output_ids, counts = np.unique(known[rows.num_prompt[row] :], return_counts=True)
    penalize_(
        logits,
        torch.from_numpy(known.astype(np.int64)).to(logits.device),
        torch.from_numpy(output_ids.astype(np.int64)).to(logits.device),
        torch.from_numpy(counts).to(logits.device),
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )
