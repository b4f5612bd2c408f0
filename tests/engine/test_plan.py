"""A plan of decodes and chunks: decodes first, those of one adapter together."""

import numpy as np
import pytest

from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows

# By row: tokens known, of which computed, the slot of its adapter
ROWS = [(8, 7, 1), (9, 8, -1), (5, 4, 1), (7, 6, 0), (9, 2, 0), (4, 3, -1), (6, 0, -1)]


def rows_with(slots: list[int]) -> Rows:
    rows = Rows(max_seqs=len(ROWS), max_model_len=16, num_groups=1, page_tokens=4)
    for row, ((known, computed, _), slot) in enumerate(zip(ROWS, slots, strict=True)):
        rows.num_tokens[row], rows.num_computed[row], rows.adapter_slots[row] = known, computed, slot
    return rows


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([-1] * len(ROWS), [2, 0, 3, 1, 5, 6, 4]),  # row 5 has one token left of its prompt
        ([slot for *_, slot in ROWS], [1, 5, 3, 2, 0, 6, 4]),
    ],
    ids=["one kind", "adapters"],
)
def test_decodes_come_first_and_adapters_together(slots: list[int], expected: list[int]) -> None:
    rows = rows_with(slots)
    plan = Plan.of(np.array([2, 0, 3, 1]), {6: 5, 4: 7, 5: 1}, rows)
    assert plan.rows.tolist() == expected
    assert plan.num_decodes == 5
    assert plan.lens.tolist() == [1] * 5 + [5, 7]
    assert plan.starts.tolist() == rows.num_computed[plan.rows].tolist()
    assert plan.samples.tolist() == [True] * 5 + [False, True]
    assert plan.num_tokens == 17


def test_a_step_may_have_decodes_alone_or_chunks_alone() -> None:
    rows = rows_with([-1] * len(ROWS))
    decodes = Plan.of(np.array([3, 0]), {}, rows)
    assert (decodes.rows.tolist(), decodes.num_decodes, decodes.num_tokens) == ([3, 0], 2, 2)
    chunks = Plan.of(np.empty(0, np.intp), {4: 7, 6: 6}, rows)
    assert (chunks.rows.tolist(), chunks.num_decodes, chunks.num_tokens) == ([4, 6], 0, 13)


def test_a_decode_whose_token_is_its_last_gives_none() -> None:
    rows = rows_with([-1] * len(ROWS))
    rows.num_tokens[3] += 1  # one more is on its way, and nothing follows it
    plan = Plan.of(np.array([3, 0]), {}, rows)
    assert (plan.rows.tolist(), plan.num_decodes) == ([0, 3], 1)
    assert plan.samples.tolist() == [True, False]
