"""Products in bf16 in C: right to a rounding, and a row the same in every batch."""

import pytest
import torch
from torch import Tensor

from cabochon.kernels.native.library import function
from cabochon.kernels.native.linear import fits, linear, pack

SIZES = [(16, 16), (48, 32), (80, 336), (640, 1024), (1040, 48)]
pytestmark = pytest.mark.usefixtures("build")


@pytest.fixture
def _bf16(build: str) -> None:
    if not function("cabochon_can_multiply", "")():
        pytest.skip(f"{build}, or this CPU, does not multiply bf16 in vectors")


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).bfloat16()


def product(x: Tensor, packed: Tensor) -> Tensor:
    out = torch.full((len(x), len(packed) * 16), torch.nan, dtype=torch.bfloat16)
    linear(x, packed, out=out)
    return out


def test_the_instruction_is_in_the_best_library_alone(build: str) -> None:
    has_it = torch.cpu._is_avx512_bf16_supported()
    assert bool(function("cabochon_can_multiply", "")()) == (build == "_v4_vnni" and has_it)


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_a_weight_is_packed_in_the_order_of_the_instruction(N: int, K: int) -> None:
    weight = random(N, K)
    expected = weight.view(N // 16, 16, K // 2, 2).transpose(1, 2)
    assert torch.equal(pack(weight), expected)
    assert torch.equal(pack(random(K, N).T), random(K, N).T.reshape(N // 16, 16, K // 2, 2).transpose(1, 2))


@pytest.mark.usefixtures("_bf16")
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 33, 100])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_products_are_exact_but_for_rounding(T: int, N: int, K: int) -> None:
    x, weight = random(T, K, seed=1), random(N, K)
    truth = x.double() @ weight.double().T
    sums = 4 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    rounding = torch.finfo(torch.bfloat16).eps / 2 * (truth.abs() + sums)
    assert ((product(x, pack(weight)).double() - truth).abs() <= sums + rounding).all()


@pytest.mark.usefixtures("_bf16")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_every_batch_and_by_any_thread(threads: int) -> None:
    x, packed = random(130, 336, seed=1), pack(random(1040, 336))
    whole = product(x, packed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 6, 10, 16, 50):
            for start in (0, 7, 130 - rows):
                assert torch.equal(product(x[start : start + rows], packed), whole[start : start + rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_bf16")
def test_nan_and_infinity_stay_in_their_row_and_small_integers_are_exact() -> None:
    weight = (torch.arange(48 * 32).view(48, 32) % 5 - 2).bfloat16()
    x = (torch.arange(20 * 32).view(20, 32) % 3 - 1).bfloat16()
    x[2, 5], x[18, 0], weight[:, 5], weight[:, 0] = torch.nan, torch.inf, 1, 1
    out = product(x, pack(weight))
    assert out[2].isnan().all()
    assert not out[18].isfinite().any()
    others = [row for row in range(20) if row not in (2, 18)]
    assert torch.equal(out[others].double(), x[others].double() @ weight.double().T)


def test_what_does_not_fit_is_refused() -> None:
    weight = random(32, 48)
    for wrong in (weight.float(), random(33, 48), random(32, 40)):
        assert not fits(wrong)
        with pytest.raises(ValueError, match="bf16 with multiples of 16"):
            pack(wrong)
    packed, out = pack(weight), torch.empty((2, 32), dtype=torch.bfloat16)
    for x, into in (
        (random(2, 32), out),
        (random(2, 48), out[:1]),
        (random(2, 48).float(), out),
        (random(2, 96)[:, ::2], out),
        (random(2, 48), out.float()),
    ):
        with pytest.raises(ValueError, match="must"):
            linear(x, packed, out=into)
