"""The judge of the kernels: what passes, what does not, and what no budget excuses."""

import pytest
import torch
from torch import Tensor

from cabochon.kernels.error_budget import assert_within_budget

EPS = torch.finfo(torch.bfloat16).eps  # 2⁻⁷
TRUTH = torch.tensor([8.0, -1.0, 0.5], dtype=torch.float64)
LOW = torch.tensor([8.0, -1.0, 0.75], dtype=torch.bfloat16)  # wrong by ¼
BUDGET = 2 * 0.25 + EPS * 8  # 0.5625


def off_by(error: float, index: int = 0) -> Tensor:
    """TRUTH in bf16, one entry of it wrong. The errors of the tests are exact in bf16."""
    actual = TRUTH.clone()
    actual[index] += error
    return actual.bfloat16()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_twice_the_error_of_the_working_precision_and_one_eps_of_the_largest_value_pass(
    index: int, sign: int
) -> None:
    actual = off_by(sign * 0.5625, index)
    assert (actual.double() - TRUTH).abs().max() == BUDGET
    assert_within_budget(actual, LOW, TRUTH)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_more_than_that_fails_with_both_numbers(index: int) -> None:
    with pytest.raises(AssertionError, match=r"error 6\.25e-01 over budget 5\.62e-01"):
        assert_within_budget(off_by(0.625, index), LOW, TRUTH)


def test_the_factor_is_the_callers_choice() -> None:
    assert_within_budget(off_by(1.0), LOW, TRUTH, factor=4)
    with pytest.raises(AssertionError, match="over budget"):
        assert_within_budget(off_by(0.5), LOW, TRUTH, factor=1)


def test_eps_is_that_of_the_dtype_under_test() -> None:
    truth = torch.tensor([8.0], dtype=torch.float64)
    wrong = torch.tensor([8 + 2**-7])  # the next number in fp16, whose eps is 2⁻¹⁰
    assert_within_budget(wrong.half(), truth.half(), truth)
    with pytest.raises(AssertionError, match="over budget"):
        assert_within_budget(wrong, truth.float(), truth)


def test_an_exact_result_passes_where_nothing_may_be_wrong() -> None:
    zeros = torch.zeros(3)
    assert_within_budget(zeros, zeros, zeros.double())
    with pytest.raises(AssertionError, match=r"over budget 0\.00e"):
        assert_within_budget(zeros + 1e-30, zeros, zeros.double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_never_pass(bad: float) -> None:
    actual = off_by(0.0)
    actual[1] = bad
    with pytest.raises(AssertionError, match="values are not finite"):
        assert_within_budget(actual, LOW, TRUTH)
    with pytest.raises(AssertionError, match="is not finite"):
        assert_within_budget(LOW, actual, TRUTH)
    with pytest.raises(AssertionError, match="the truth is not finite"):
        assert_within_budget(LOW, LOW, actual.double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_low_precision_result_that_is_not_finite_excuses_no_error(bad: float) -> None:
    low = LOW.clone()
    low[0] = bad
    with pytest.raises(AssertionError):
        assert_within_budget(off_by(100.0), low, TRUTH)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_truth_that_is_not_finite_is_no_truth(bad: float) -> None:
    truth = TRUTH.clone()
    truth[0] = bad
    with pytest.raises(AssertionError):
        assert_within_budget(off_by(100.0, 1), LOW, truth)


def test_a_result_of_another_shape_does_not_pass() -> None:
    truth = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.ones(1, 3), truth.float(), truth)
