"""Products in int8: bit for bit the definition in every library, and the head's largest the exact one."""

import pytest
import torch
from guarded import SENTINEL
from torch import Tensor

from cabochon.engine.int8_linear import Int8Head
from cabochon.kernels.native.int8 import int8_head, int8_linear, int8_linear_reference
from cabochon.kernels.native.quantize import quantize_weight

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = [pytest.mark.usefixtures("build"), pytest.mark.parametrize("dtype", DTYPES, ids=str)]


def random(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    memory = torch.full((len(x) * len(values) + 128,), SENTINEL, dtype=x.dtype)
    out = memory[64:-64].view(len(x), len(values))
    int8_linear(x, values, scales, out=out)
    assert (memory[:64] == SENTINEL).all()
    assert (memory[-64:] == SENTINEL).all()
    return out


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 11, 19])
@pytest.mark.parametrize(("N", "K"), [(4, 16), (7, 32), (64, 48), (131, 640), (66, 256)])
def test_every_bit_is_the_definitions(T: int, N: int, K: int, dtype: torch.dtype) -> None:
    weight, x = random(N, K, dtype, seed=0) * 0.02, random(T, K, dtype, seed=1)
    values, scales = quantize_weight(weight)
    assert torch.equal(product(x, values, scales), int8_linear_reference(x, values, scales))


@pytest.mark.parametrize("K", [8192, 8208, 20_000])
def test_sums_of_the_largest_values_do_not_overflow(K: int, dtype: torch.dtype) -> None:
    x, weight = torch.ones(3, K, dtype=dtype), torch.ones(5, K, dtype=dtype)
    x[1] = -1
    values, scales = quantize_weight(weight)
    out = product(x, values, scales)
    assert torch.equal(out, int8_linear_reference(x, values, scales))
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, atol=0, rtol=0.005)


def test_a_row_has_the_same_bits_in_every_batch_and_by_any_thread(dtype: torch.dtype) -> None:
    values, scales = quantize_weight(random(203, 96, dtype, seed=0))
    x = random(40, 96, dtype, seed=1) * (10.0 ** torch.arange(-8, 12, 0.5)).to(dtype)[:, None]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = product(x, values, scales)
        torch.set_num_threads(1)
        assert torch.equal(product(x, values, scales), whole)
    finally:
        torch.set_num_threads(threads)
    for rows in (1, 2, 3, 4, 7):
        for start in (0, 1, 9, 40 - rows):
            assert torch.equal(product(x[start : start + rows], values, scales), whole[start : start + rows])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_fills_its_row_and_no_other(broken: float, dtype: torch.dtype) -> None:
    values, scales = quantize_weight(random(33, 64, dtype, seed=0))
    x = random(6, 64, dtype, seed=1)
    clean = product(x, values, scales)
    x[2, 5] = broken
    out = product(x, values, scales)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_zeros_give_zeros(dtype: torch.dtype) -> None:
    weight, x = random(32, 64, dtype, seed=0), random(3, 64, dtype, seed=1)
    weight[3], x[1] = 0, 0
    out = product(x, *quantize_weight(weight))
    assert not out[1].any()
    assert not out[:, 3].any()


@pytest.mark.parametrize(("V", "E"), [(4, 16), (600, 48), (1537, 640)])
def test_only_what_may_be_the_largest_differs_from_the_product(V: int, E: int, dtype: torch.dtype) -> None:
    weight, x = random(V, E, dtype, seed=0), random(9, E, dtype, seed=1)
    x[4] = 0
    out, approximate = Int8Head(weight)(x), product(x, *quantize_weight(weight))
    truth = x.double() @ weight.double().T
    changed = out != approximate
    assert (changed.sum(1) < 40).all()
    assert not changed[4].any()
    best = truth.argmax(1)
    exact = (x.float() * weight[best].float()).sum(1).to(dtype)
    got = out.gather(1, best[:, None])[:, 0]
    torch.testing.assert_close(got, exact, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
    assert (got == out.amax(1)).all()


def test_what_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    x, out = torch.zeros(2, 32, dtype=dtype), torch.zeros(2, 8, dtype=dtype)
    values, scales = torch.zeros(8, 32, dtype=torch.int8), torch.ones(8)
    for odd in (torch.zeros(8, 48, dtype=torch.int8), values.int(), torch.zeros(32, 8, dtype=torch.int8).T):
        with pytest.raises(ValueError, match=r"values must be a contiguous \[8, 32\] int8"):
            int8_linear(x, odd, scales, out=out)
    with pytest.raises(ValueError, match=r"must be a contiguous \[8\] fp32"):
        int8_linear(x, values, scales[:7], out=out)
    with pytest.raises(ValueError, match="must fit"):
        int8_linear(x, values[:3], scales[:3], out=out[:, :3].contiguous())
    with pytest.raises(ValueError, match="must be contiguous"):
        int8_head(x, values, scales, torch.zeros(32, 8, dtype=dtype).T, scales, 1.0, out=out)
