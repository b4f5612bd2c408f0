"""Weights in int8: near the unquantized product, a row its own, the head's largest the unquantized one."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import absent
from torch import Tensor

from cabochon.engine.errors import ConfigError
from cabochon.engine.int8_linear import Int8Head, Int8Linear
from cabochon.kernels.native.library import library
from cabochon.kernels.native.quantize import quantize_weight

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _library() -> None:
    if library() is None:
        absent("no C library for this CPU: it is built by pip install, with a C compiler")


def random(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def restored_weight(weight: Tensor) -> Tensor:
    values, scales = quantize_weight(weight)
    return values.double() * scales[:, None].double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_in_8_bits_costs_less_than_a_percent(dtype: torch.dtype) -> None:
    weight, x = random(640, 640, dtype, seed=0), random(64, 640, dtype, seed=1)
    truth = F.linear(x.double(), weight.double())
    error = (Int8Linear(weight)(x).double() - truth).norm() / truth.norm()
    assert 0.005 < error < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_within_half_a_step(dtype: torch.dtype) -> None:
    weight = random(131, 80, dtype, seed=0)
    values, scales = quantize_weight(weight)
    assert values.shape == (131, 96)
    assert not values[:, 80:].any()
    assert values.abs().max() == 127
    assert ((restored_weight(weight)[:, :80] - weight).abs() <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize("make", [Int8Linear, Int8Head])
@pytest.mark.parametrize("shape", [(3, 64), (64, 24)])
def test_a_shape_that_the_kernel_does_not_take_is_refused(
    make: type[Int8Linear] | type[Int8Head], shape: tuple[int, int]
) -> None:
    with pytest.raises(ConfigError, match=rf"got int8 and {shape[0]} × {shape[1]}: use none$"):
        make(torch.ones(shape))


@pytest.mark.parametrize("make", [Int8Linear, Int8Head])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row_and_fill_it(
    dtype: torch.dtype, make: type[Int8Linear] | type[Int8Head]
) -> None:
    linear = make(random(97, 64, dtype, seed=0))
    x = random(8, 64, dtype, seed=1)
    clean = linear(x)
    x[2, 5], x[5, 63], x[6, 0] = torch.nan, -torch.inf, torch.inf
    out = linear(x)
    assert not out[[2, 5, 6]].isfinite().any()
    others = [0, 1, 3, 4, 7]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("make", [Int8Linear, Int8Head])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_of_the_weight_shows(make: type[Int8Linear] | type[Int8Head], broken: float) -> None:
    weight = random(32, 64, torch.float32, seed=0)
    weight[7, 3] = broken
    out = make(weight)(random(4, 64, torch.float32, seed=1))
    assert (~out.isfinite() == (torch.arange(32) == 7)).all()


@pytest.mark.parametrize("make", [Int8Linear, Int8Head])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_give_zeros(dtype: torch.dtype, make: type[Int8Linear] | type[Int8Head]) -> None:
    weight, x = random(32, 64, dtype, seed=0), random(8, 64, dtype, seed=1)
    weight[3], x[5] = 0, 0
    out = make(weight)(x)
    assert not out[5].any()
    assert not out[:, 3].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_entries_of_a_layer_are_the_quantized_weights_and_of_the_head_the_embeddings(
    dtype: torch.dtype,
) -> None:
    weight, x = random(131, 64, dtype, seed=0), random(131, 64, dtype, seed=1)
    for linear, of in ((Int8Linear(weight), restored_weight(weight)), (Int8Head(weight), weight.double())):
        truth = (x.double() * of).sum(-1)
        assert ((linear.exact(x, weight).double() - truth).abs() <= 1e-5 * (1 + truth.abs())).all()


def outliers(generator: torch.Generator, rows: int, columns: int, sizes: float) -> Tensor:
    """Rows of very unequal size, with columns that stand out."""
    x = torch.randn((rows, columns), generator=generator)
    x *= torch.exp(sizes * torch.randn((rows, 1), generator=generator))
    return x * torch.exp(sizes * torch.randn(columns, generator=generator))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([4, 5, 50, 1031]),
    columns=st.sampled_from([16, 64, 336]),
    sizes=st.sampled_from([0.0, 0.5, 2.0]),
    near=st.sampled_from([None, 1e-1, 1e-2, 1e-4]),
    shift=st.sampled_from([0.0, -3.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_the_largest_of_the_head_is_that_of_the_unquantized_product(
    seed: int, vocab: int, columns: int, sizes: float, near: float | None, shift: float, dtype: torch.dtype
) -> None:
    """near: how alike tokens are. shift: makes all logits negative, where bounds change sides."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = outliers(generator, 5, columns, sizes), outliers(generator, vocab, columns, sizes)
    if near is not None:
        weight = weight[:1] + near * weight
    x, weight = x.to(dtype), (weight + shift * x.mean(0)).to(dtype)
    out = Int8Head(weight)(x).double()
    truth = F.linear(x.double(), weight.double())
    noise = 1e-6 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1))
    for row in range(5):
        best = truth[row] >= truth[row].max() - 2 * noise[row].max()  # in fp32 any of them may be the largest
        is_first = out[row] == out[row].max()
        assert (is_first & best).any(), "a token that is the largest is not among the largest"
        exact = truth[row].max().to(dtype).double()  # and has its value
        step = 2 * noise[row].max() + torch.finfo(dtype).eps * exact.abs()
        assert (out[row].max() - exact).abs() <= step


def test_bounds_that_exclude_nothing_compute_everything() -> None:
    weight = random(1, 64, torch.bfloat16, seed=0).repeat(1097, 1)  # one token, 1,097 times
    x = random(4, 64, torch.bfloat16, seed=1)
    expected = (x.double() @ weight[0].double()).bfloat16()[:, None].expand(4, 1097)
    assert torch.equal(Int8Head(weight)(x), expected)


def test_int8_takes_half_of_bf16_and_the_weight_of_a_layer_is_not_kept() -> None:
    weight = random(131, 64, torch.bfloat16, seed=0)
    storage = weakref.ref(weight)
    linear, head = Int8Linear(weight), Int8Head(weight)
    assert linear.num_bytes == 131 * 64 + 131 * 4  # scales
    assert head.num_bytes == linear.num_bytes + 131 * 4  # errors
    assert linear.is_copy
    assert (linear.out_features, linear.in_features) == (head.out_features, head.in_features) == (131, 64)
    del head, weight
    assert storage() is None
