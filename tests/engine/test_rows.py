"""Rows: what a request finds when it gets one, and what it leaves behind."""

import numpy as np
import pytest

from cabochon.engine.rows import NULL_PAGE, Rows


def rows_of(max_seqs: int = 3, max_model_len: int = 10) -> Rows:
    return Rows(max_seqs=max_seqs, max_model_len=max_model_len, num_groups=2, page_tokens=4)


@pytest.mark.parametrize(("max_model_len", "pages"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (10, 3)])
def test_page_tables_are_as_wide_as_the_longest_sequence(max_model_len: int, pages: int) -> None:
    rows = rows_of(max_model_len=max_model_len)
    assert rows.page_tables.shape == (2, 3, pages)
    assert rows.token_ids.shape == (3, max_model_len)
    assert (rows.page_tables == NULL_PAGE).all()


def test_a_taken_row_knows_its_tokens_and_has_computed_none() -> None:
    rows = rows_of()
    row = rows.take([7, 8, 9, 5], num_prompt=3)
    assert rows.token_ids[row, :4].tolist() == [7, 8, 9, 5]
    assert (rows.num_tokens[row], rows.num_prompt[row], rows.num_computed[row]) == (4, 3, 0)


def test_a_row_can_be_filled_to_the_last_token() -> None:
    rows = rows_of()
    row = rows.take(list(range(10)), 10)
    assert rows.token_ids[row].tolist() == list(range(10))


def test_each_row_is_given_once() -> None:
    rows = rows_of()
    assert sorted(rows.take([i], 1) for i in range(3)) == [0, 1, 2]
    assert rows.num_free == 0
    with pytest.raises(IndexError):
        rows.take([9], 1)


def test_rows_come_back_in_any_order() -> None:
    rows = rows_of()
    taken = [rows.take([i], 1) for i in range(3)]
    for row in (taken[1], taken[2], taken[0]):
        rows.give_back(row)
    assert rows.num_free == 3
    assert {rows.take([i], 1) for i in range(3)} == set(taken)


def test_a_row_that_comes_back_forgets_its_counts() -> None:
    rows = rows_of(max_seqs=1)
    row = rows.take([1, 2, 3], 2)
    rows.num_computed[row] = 3
    rows.give_back(row)
    assert not rows.num_tokens.any()
    assert not rows.num_computed.any()
    assert not rows.num_prompt.any()


def test_a_shorter_request_in_a_used_row_has_its_own_counts() -> None:
    rows = rows_of(max_seqs=1)
    rows.give_back(rows.take(list(range(10)), 10))
    row = rows.take([4, 5], 2)
    assert (rows.num_tokens[row], rows.num_prompt[row], rows.num_computed[row]) == (2, 2, 0)


def test_a_row_leaves_the_others_alone() -> None:
    rows = rows_of()
    first = rows.take([1, 2], 2)
    before = rows.token_ids[first].copy()
    second = rows.take([6, 7, 8], 3)
    rows.give_back(second)
    assert np.array_equal(rows.token_ids[first], before)
    assert rows.num_tokens[first] == 2


def test_a_row_does_not_go_back_with_pages() -> None:
    rows = rows_of()
    row = rows.take([1], 1)
    rows.page_tables[1, row, 2] = 5
    with pytest.raises(AssertionError, match="a row goes back with pages"):
        rows.give_back(row)
    assert rows.num_free == 2


def test_a_free_row_with_pages_is_noticed() -> None:
    rows = rows_of(max_seqs=1)
    rows.page_tables[0, 0, 0] = 5
    with pytest.raises(AssertionError, match="a free row holds pages"):
        rows.take([1], 1)
