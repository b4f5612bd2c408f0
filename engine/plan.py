"""What one step computes, chosen by the scheduler and run by the runner, and what comes out of it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.messages import TokenLogprobs
from cabochon.engine.rows import Rows


@dataclass(frozen=True, slots=True)
class Plan:
    """S rows, decodes first; of them, as of the rest, those of one adapter stand together.

    Sequence i computes positions starts[i] .. starts[i] + lens[i] (half-open).

    rows:        [S] intp, indices into Rows; of another type they would be converted at each use
    starts:      [S] int32, num_computed when the step begins
    lens:        [S] int32, tokens to compute, ≥ 1
    samples:     [S] bool, this chunk reaches the last known token, so the next one is sampled
    num_decodes: the first that many sequences have one token to compute, their last known one
    """

    rows: NDArray[np.intp]
    starts: NDArray[np.int32]
    lens: NDArray[np.int32]
    samples: NDArray[np.bool_]
    num_decodes: int

    @property
    def num_tokens(self) -> int:
        return int(self.lens.sum())

    @classmethod
    def of(cls, decodes: NDArray[np.intp], chunks: Mapping[int, int], rows: Rows) -> Self:
        """decodes: rows with one token each. chunks: tokens to compute of other rows."""
        row_ids, lens = decodes, np.ones(len(decodes) + len(chunks), np.int32)
        if chunks:
            row_ids = np.concatenate([decodes, np.array(list(chunks), np.intp)])
            lens[len(decodes) :] = list(chunks.values())
        starts = rows.num_computed[row_ids]
        samples = starts + lens == rows.num_tokens[row_ids]
        is_decode = samples & (lens == 1)
        slots = rows.adapter_slots[row_ids]
        num_decodes = int(np.count_nonzero(is_decode))
        is_sorted = np.count_nonzero(is_decode[:num_decodes]) == num_decodes
        if not is_sorted or np.count_nonzero(slots != slots[0]):  # seldom, and sorting takes a while
            order = np.lexsort((slots, ~is_decode))  # stable
            row_ids, starts, lens, samples = row_ids[order], starts[order], lens[order], samples[order]
        return cls(row_ids, starts, lens, samples, num_decodes)

    def without(self, row_ids: Collection[int]) -> Self:
        """The sequences of other rows."""
        if not row_ids:
            return self
        keep = ~np.isin(self.rows, list(row_ids))
        num_decodes = int(keep[: self.num_decodes].sum())
        return type(self)(
            self.rows[keep], self.starts[keep], self.lens[keep], self.samples[keep], num_decodes
        )


class PromptLogprobs(NamedTuple):
    """Of the prompt tokens at positions start + 1, start + 2, ..."""

    start: int
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a plan, in the order of the rows that sample; log probabilities by row, where asked for.

    token_ids: [R] int32, meaningless where is_finite: [R] bool is False, and for rows that are late (the mask
    of their grammar is not there yet) or stuck (their grammar has no next token)
    bound: the tokens of rows that a grammar binds
    """

    token_ids: NDArray[np.int32]
    is_finite: NDArray[np.bool_]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    bound: dict[int, int] = field(default_factory=dict)
    late: list[int] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)

    def without(self, row_ids: Collection[int]) -> None:
        """Forget what is told of these rows; token_ids and is_finite stay as they are."""
        for found in (self.logprobs, self.prompt_logprobs, self.bound):
            for row in found.keys() & set(row_ids):
                del found[row]
        for rows in (self.late, self.stuck):
            rows[:] = [row for row in rows if row not in row_ids]
