"""Log probabilities of tokens: of the capped logits, by a logsumexp over the whole vocabulary.

Rounded logits (bf16) are computed again in fp32 for the tokens that are reported, so that these values and
their order are exact; the sum keeps the rounded rest, whose errors cancel. Temperature, bias and penalties do
not enter.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.engine.messages import TokenLogprobs
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.definitions import softcap_

ExactLogits = Callable[[Tensor, Tensor], Tensor]  # rows [C], token ids [C] -> uncapped fp32 logits [C]
SPARE = 16  # rounded candidates beside those asked for: rounding moves a token by few ranks


class PromptPart(NamedTuple):
    """Prompt tokens whose log probabilities a plan makes known.

    start: of the row's chunk. first: the hidden row of the first of them. next_ids: [n] int32, the tokens at
    start + 1 and on; n may be 0.
    """

    row: int
    start: int
    first: int
    next_ids: NDArray[np.int32]


def prompt_parts(plan: Plan, rows: Rows, wants: Callable[[int], bool]) -> list[PromptPart]:
    """Of the rows that want them: position p tells of the prompt token at p + 1."""
    firsts = np.cumsum(plan.lens) - plan.lens
    parts = []
    for seq in np.flatnonzero(plan.starts < rows.num_prompt[plan.rows]).tolist():
        row, start = int(plan.rows[seq]), int(plan.starts[seq])
        if wants(row):
            num_known = min(int(plan.lens[seq]), int(rows.num_prompt[row]) - 1 - start)  # next is prompt
            next_ids = rows.token_ids[row, start + 1 : start + 1 + num_known]
            parts.append(PromptPart(row, start, int(firsts[seq]), next_ids))
    return parts


class Ranking(NamedTuple):
    """chosen: [R] fp32, of the given tokens. top_ids, top: [R, count], the most likely, best first."""

    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    def rows(self) -> list[TokenLogprobs]:
        """One a row. Waits for the device."""
        columns = (self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist())
        return [TokenLogprobs(*row) for row in zip(*columns, strict=True)]


def token_logprobs(
    logits: Tensor, token_ids: Tensor, count: int, softcap: float | None, exact: ExactLogits | None
) -> Ranking:
    """logits: [R, V] fp32, uncapped, overwritten. token_ids: [R] int64. Waits for nothing."""
    num_rows, vocab_size = logits.shape
    if exact is not None:
        likely = logits.topk(min(2 * count + SPARE, vocab_size)).indices  # [R, C - 1]
        candidates = torch.cat([likely, token_ids[:, None]], dim=1)  # [R, C]
        rows = torch.arange(num_rows, device=logits.device)[:, None].expand_as(candidates)
        values = exact(rows.reshape(-1), candidates.reshape(-1)).view_as(candidates)
        logits.scatter_(1, candidates, values)
    if softcap is not None:
        logits = softcap_(logits, softcap)
    logprobs = logits - logits.logsumexp(-1, keepdim=True)  # [R, V]
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    return Ranking(chosen, *_descending(logprobs, min(count, vocab_size)))


def _descending(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row; equal ones by id, which topk does not promise."""
    ids = logprobs.topk(count).indices.sort(-1).values  # [R, count]
    values, order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), values
