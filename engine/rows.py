"""State of the running requests: one row each, as arrays, from admission to finish or preemption.

A batch is an index vector into the rows, so nothing is ever condensed or moved. The scheduler writes, the
runner reads. Knows nothing of pages' contents nor of devices.
"""

import numpy as np
from numpy.typing import NDArray

NO_ADAPTER = -1  # the slot of requests to the base model
NULL_PAGE = 0  # never allocated nor written, all zero: what nobody sees is read from there


class Rows:
    """`max_seqs` rows, `num_groups` page tables.

    token_ids:    [max_seqs, max_model_len] int32, prompt then output
    num_tokens:   [max_seqs] int32, known tokens, and those that only the device knows yet
    num_pending:  [max_seqs] int32, how many of them only the device knows: the last ones
    num_computed: [max_seqs] int32, tokens whose K and V are in pages
    num_prompt:   [max_seqs] int32
    adapter_slots: [max_seqs] int32, −1 for the base model
    page_tables:  [num_groups, max_seqs, M] int32, NULL_PAGE where nothing is held
    """

    def __init__(self, *, max_seqs: int, max_model_len: int, num_groups: int, page_tokens: int) -> None:
        max_pages = -(-max_model_len // page_tokens)
        self.max_seqs = max_seqs
        self.page_tokens = page_tokens
        self.token_ids: NDArray[np.int32] = np.zeros((max_seqs, max_model_len), np.int32)
        self.num_tokens: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        self.num_pending: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        self.num_computed: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        self.num_prompt: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        self.adapter_slots: NDArray[np.int32] = np.full(max_seqs, NO_ADAPTER, np.int32)
        self.page_tables: NDArray[np.int32] = np.full((num_groups, max_seqs, max_pages), NULL_PAGE, np.int32)
        self._free = list(range(max_seqs - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def known(self, row: int) -> NDArray[np.int32]:
        """The row's tokens that have come back from the device. A view."""
        return self.token_ids[row, : self.num_tokens[row] - self.num_pending[row]]

    def take(self, token_ids: NDArray[np.int32], num_prompt: int) -> int:
        """Give a row to a request whose known tokens are `token_ids`. Raises IndexError if none is free."""
        row = self._free.pop()
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_tokens[row] = len(token_ids)
        self.num_prompt[row] = num_prompt
        self.num_computed[row] = 0
        assert not self.page_tables[:, row].any(), "a free row holds pages"
        return row

    def give_back(self, row: int) -> None:
        """Free the row. Its pages must have gone back before: its tables are NULL_PAGE."""
        assert not self.page_tables[:, row].any(), "a row goes back with pages"
        for counts in (self.num_tokens, self.num_pending, self.num_computed, self.num_prompt):
            counts[row] = 0
        self.adapter_slots[row] = NO_ADAPTER
        self._free.append(row)
