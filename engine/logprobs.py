"""Log probabilities of tokens: of the capped logits, by a logsumexp over the whole vocabulary.

Rounded logits (bf16) are computed again in fp32 for the tokens that are reported, so that these values and
their order are exact; the sum keeps the rounded rest, whose errors cancel. Temperature, bias and penalties do
not enter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cabochon.engine.messages import TokenLogprobs
from cabochon.kernels.definitions import softcap_

ExactLogits = Callable[[Tensor, Tensor], Tensor]  # rows [C], token ids [C] -> uncapped fp32 logits [C]
SPARE = 16  # rounded candidates beside those asked for: rounding moves a token by few ranks


def token_logprobs(
    logits: Tensor, token_ids: Tensor, count: int, softcap: float | None, exact: ExactLogits | None
) -> list[TokenLogprobs]:
    """One result a row. logits: [R, V] fp32, uncapped, overwritten. token_ids: [R] int64."""
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
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0].tolist()
    top_ids, top = _descending(logprobs, min(count, vocab_size))
    return [TokenLogprobs(*row) for row in zip(chosen, top_ids, top, strict=True)]


def _descending(logprobs: Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """The `count` largest of each row; equal ones by id, which topk does not promise."""
    ids = logprobs.topk(count).indices.sort(-1).values  # [R, count]
    values, order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order).tolist(), values.tolist()
