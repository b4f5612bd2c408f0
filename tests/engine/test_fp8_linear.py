"""Products in fp8: exactly those of the rounded numbers, near those of the numbers, and a row is its own.

Each test runs on both paths: the CPU's emulation, and torch._scaled_mm, which is the GPU's (its CPU kernel).
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cabochon.engine.errors import ConfigError
from cabochon.engine.linear import ROW_MULTIPLE, Fp8Linear, Linear, _row_quantizer
from cabochon.kernels import definitions

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 16), (16, 32), (97, 48), (131, 64), (640, 640), (1000, 32), (17, 4096), (2100, 16)]


@pytest.fixture(params=["emulated", "scaled_mm"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scaled_mm":
        monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    return str(request.param)


def random(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def restored(x: Tensor) -> Tensor:
    """x as e4m3 and its scales hold it, in fp64."""
    values, scales = definitions.quantize_rows(x)
    return values.double() * scales[..., None].double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_product_is_that_of_the_quantized_operands(n: int, k: int, dtype: torch.dtype) -> None:
    weight, x = random(n, k, dtype, seed=0) * 0.02, random(64, k, dtype, seed=1)
    out = Fp8Linear(weight)(x)
    assert (out.dtype, out.shape) == (dtype, (64, n))
    a, b = restored(x), restored(weight)
    truth = F.linear(a, b)
    # Sums and scales in fp32: a few ulp of Σ|x w|. Rounded to the dtype twice where it is emulated.
    sums = 4 * torch.finfo(torch.float32).eps * F.linear(a.abs(), b.abs())
    assert ((out.double() - truth).abs() <= sums + torch.finfo(dtype).eps * (truth.abs() + sums)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_error_of_fp8_is_what_its_three_bits_of_mantissa_allow(
    n: int, k: int, dtype: torch.dtype
) -> None:
    weight, x = random(n, k, dtype, seed=0), random(64, k, dtype, seed=1)

    def bound(of: Tensor) -> Tensor:  # half a step: 2⁻⁴ of a value, or 2⁻¹⁰ of the scale below 2⁻⁶
        scales = definitions.quantize_rows(of)[1].double()
        return torch.maximum(of.double().abs() * 2.0**-4, scales[:, None] * 2.0**-10)

    a, b, a_error, b_error = x.double().abs(), weight.double().abs(), bound(x), bound(weight)
    allowed = F.linear(a, b_error) + F.linear(a_error, b) + F.linear(a_error, b_error)
    rounding = 2 * torch.finfo(dtype).eps * F.linear(a + a_error, b + b_error)
    truth = F.linear(x.double(), weight.double())
    error = (Fp8Linear(weight)(x).double() - truth).abs()
    assert (error <= allowed + rounding).all()


def test_it_is_an_approximation_of_three_to_four_percent() -> None:
    weight, x = random(640, 640, torch.float32, seed=0), random(64, 640, torch.float32, seed=1)
    truth = F.linear(x, weight)
    error = (Fp8Linear(weight)(x) - truth).norm() / truth.norm()
    assert 0.03 < error < 0.04


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_channels_of_very_unequal_size_keep_their_precision(dtype: torch.dtype) -> None:
    weight, x = random(48, 64, dtype, seed=0), random(8, 64, dtype, seed=1)
    sizes, channels = 10.0 ** torch.arange(-12.0, 12.0, 3), 10.0 ** torch.linspace(-8, 8, 48)
    out = Fp8Linear((weight * channels[:, None]).to(dtype))((x * sizes[:, None]).to(dtype))
    truth = F.linear(x.double(), weight.double())
    error = (out.double() / sizes[:, None] / channels - truth).norm(dim=1) / truth.norm(dim=1)
    assert (error < 0.06).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (131, 64), (640, 640), (17, 4096)])
def test_a_row_has_the_same_bits_in_every_batch(n: int, k: int, dtype: torch.dtype) -> None:
    linear = Fp8Linear(random(n, k, dtype, seed=0))
    x = random(256, k, dtype, seed=1)
    whole = linear(x)
    for rows in (4, 8, 12, 64):
        for start in (0, 4, 100, 256 - rows):
            assert torch.equal(linear(x[start : start + rows]), whole[start : start + rows]), (rows, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_whoever_stands_beside_it(dtype: torch.dtype) -> None:
    linear = Fp8Linear(random(131, 64, dtype, seed=0))
    row = random(1, 64, dtype, seed=1)
    expected = linear(row.repeat(ROW_MULTIPLE, 1))[0]
    for rows, place in ((4, 3), (8, 5), (64, 63)):
        x = random(rows, 64, dtype, seed=rows) * 1000
        x[place] = row
        assert torch.equal(linear(x)[place], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row_and_fill_it(dtype: torch.dtype) -> None:
    linear = Fp8Linear(random(97, 64, dtype, seed=0))
    x = random(8, 64, dtype, seed=1)
    clean = linear(x)
    x[2, 5], x[5, 63], x[6, 0] = torch.nan, -torch.inf, torch.inf
    out = linear(x)
    assert not out[[2, 5, 6]].isfinite().any()
    others = [0, 1, 3, 4, 7]
    assert torch.equal(out[others], clean[others])


def test_a_broken_channel_of_the_weight_shows() -> None:
    weight = random(32, 64, torch.float32, seed=0)
    weight[7, 3] = torch.nan
    out = Fp8Linear(weight)(random(4, 64, torch.float32, seed=1))
    assert (out.isnan() == (torch.arange(32) == 7)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_channels_of_zeros_give_zeros(dtype: torch.dtype) -> None:
    weight, x = random(32, 64, dtype, seed=0), random(8, 64, dtype, seed=1)
    weight[3], x[5] = 0, 0
    out = Fp8Linear(weight)(x)
    assert not out[5].any()
    assert not out[:, 3].any()
    assert out.isfinite().all()


def test_strided_rows_are_read_and_no_operand_is_written() -> None:
    weight, wide = random(97, 64, torch.bfloat16, seed=0), random(16, 128, torch.bfloat16, seed=1)
    before = weight.clone(), wide.clone()
    linear = Fp8Linear(weight)
    for x in (wide[:, :64], wide[::2, 64:]):
        assert torch.equal(linear(x), linear(x.contiguous()))
    assert torch.equal(weight, before[0])
    assert torch.equal(wide, before[1])


def test_the_weight_is_not_kept(path: str) -> None:
    weight = random(131, 64, torch.bfloat16, seed=0)
    storage = weakref.ref(weight)
    linear = Fp8Linear(weight)
    del weight
    assert storage() is None
    assert linear.is_copy
    assert (linear.out_features, linear.in_features) == (131, 64)
    # e4m3 rows padded to 16, as CUDA wants them; emulated in the working dtype, and so no smaller
    expected = 144 * 64 + 144 * 4 if path == "scaled_mm" else 131 * 64 * 2 + 131 * 4
    assert linear.num_bytes == expected


def test_rows_that_cuda_does_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows are no multiple of 16 long, got fp8 and 40: use none"):
        Fp8Linear(torch.zeros(32, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [Linear, Fp8Linear])
def test_exact_entries_are_those_of_the_product_before_it_is_rounded(
    make: type[Linear] | type[Fp8Linear], dtype: torch.dtype
) -> None:
    weight, x = random(131, 64, dtype, seed=0), random(8, 64, dtype, seed=1)
    out = make(weight.clone())(x).double()
    rows, ids = (
        index.flatten() for index in torch.meshgrid(torch.arange(8), torch.arange(131), indexing="ij")
    )
    exact = make(weight.clone()).exact(x[rows], weight[ids]).double().view(8, 131)
    sums = 1e-5 * F.linear(x.double().abs(), weight.double().abs())
    assert ((out - exact).abs() <= sums + torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.usefixtures("triton_interpreter")
def test_the_gpus_one_kernel_quantizes_as_the_definition_does() -> None:
    x = random(8, 640, torch.bfloat16, seed=1)
    values, scales = _row_quantizer(torch.device("cuda"))(x)
    expected, expected_scales = definitions.quantize_rows(x)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


def test_a_gpu_without_triton_quantizes_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert _row_quantizer(torch.device("cuda")) is definitions.quantize_rows
