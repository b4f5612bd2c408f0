"""Products with packed weights: a row's bits depend on that row alone, and F.linear's but for rounding."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from tools import ran_without_amx
from torch import Tensor

from cabochon.engine.linear import ROW_MULTIPLE, Linear

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1), (3, 5), (7, 16), (97, 56), (131, 64), (257, 127), (640, 640), (1000, 33), (17, 4097)]
ROWS = [4, 8, 12, 64, 512]


def random(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_has_the_same_bits_in_every_batch(
    n: int, k: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.bfloat16 and ran_without_amx(request):
        return
    linear = Linear(random(n, k, dtype, seed=0))
    x = random(512, k, dtype, seed=1)
    whole = linear(x)
    for rows in ROWS:
        for start in {0, 4, 100, 512 - rows}:
            end = min(start + rows, 512)
            assert torch.equal(linear(x[start:end]), whole[start:end]), (rows, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_whoever_stands_beside_it(dtype: torch.dtype) -> None:
    linear = Linear(random(131, 65, dtype, seed=0))
    row = random(1, 65, dtype, seed=1)
    expected = linear(row.repeat(ROW_MULTIPLE, 1))[0]
    for rows, place in ((4, 3), (8, 5), (12, 0), (64, 63), (512, 259)):
        x = random(rows, 65, dtype, seed=rows) * 100
        x[place] = row
        assert torch.equal(linear(x)[place], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype) -> None:
    linear = Linear(random(97, 56, dtype, seed=0))
    x = random(8, 56, dtype, seed=1)
    clean = linear(x)
    x[2, 5], x[6, 0] = torch.nan, torch.inf
    out = linear(x)
    assert out[2].isnan().all()
    assert not out[6].isfinite().any()
    others = [0, 1, 3, 4, 5, 7]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_product_is_that_of_f_linear_within_rounding(n: int, k: int, dtype: torch.dtype) -> None:
    weight, x = random(n, k, dtype, seed=0), random(64, k, dtype, seed=1)
    out = Linear(weight.clone())(x)
    assert (out.dtype, out.shape) == (dtype, (64, n))
    # Sums are in fp32: an error of a few ulp of Σ|x w|. Then one rounding to the dtype, half an ulp.
    sums = 4 * torch.finfo(torch.float32).eps * F.linear(x.double().abs(), weight.double().abs())
    truth = F.linear(x.double(), weight.double())
    rounding = torch.finfo(dtype).eps / 2 * (truth.abs() + sums) if dtype != torch.float32 else 0
    assert ((out.double() - truth).abs() <= sums + rounding).all()
    assert ((out.double() - F.linear(x, weight).double()).abs() <= 2 * (sums + rounding)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_multiplied_exactly(dtype: torch.dtype) -> None:
    weight = (torch.arange(7 * 9).view(7, 9) % 5 - 2).to(dtype)
    x = (torch.arange(4 * 9).view(4, 9) % 3 - 1).to(dtype)
    assert torch.equal(Linear(weight.clone())(x).double(), x.double() @ weight.double().T)


def test_rows_with_strides_are_read_in_place() -> None:
    linear = Linear(random(97, 56, torch.float32, seed=0))
    wide = random(16, 112, torch.float32, seed=1)
    for x in (wide[:, :56], wide[::2, 56:]):
        assert torch.equal(linear(x), linear(x.contiguous()))


def test_an_input_is_not_written() -> None:
    x = random(8, 56, torch.bfloat16, seed=1)
    before = x.clone()
    Linear(random(97, 56, torch.bfloat16, seed=0))(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_weights_are_packed_and_the_plain_ones_go(dtype: torch.dtype) -> None:
    weight = random(640, 64, dtype, seed=0)
    storage = weakref.ref(weight)
    linear = Linear(weight)
    del weight
    assert linear._weight.is_mkldnn
    assert storage() is None, "the plain weight is kept beside the packed one"
    assert (linear.out_features, linear.in_features) == (640, 64)
    assert linear.num_bytes == 640 * 64 * dtype.itemsize


def test_without_onednn_the_weight_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    weight, x = random(97, 56, torch.float32, seed=0), random(8, 56, torch.float32, seed=1)
    linear = Linear(weight)
    assert linear._weight is weight
    assert torch.equal(linear(x), F.linear(x, weight))
