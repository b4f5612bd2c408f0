"""Weights in 8 bits: bit for bit the definition in every library, with errors that bound what was changed."""

import pytest
import torch
from torch import Tensor

from cabochon.kernels.native.quantize import (
    pack,
    pack_reference,
    quantization_errors,
    quantize_weight,
    quantize_weight_reference,
)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 16), (7, 32), (66, 48), (131, 640)]
pytestmark = pytest.mark.usefixtures("build")


def random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-6, 6, (rows, 1), generator=generator)
    return (torch.randn((rows, columns), generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_bit_is_the_definitions(N: int, K: int, dtype: torch.dtype) -> None:
    weight = random(N, K, dtype)
    weight[N // 2, 1::2] = 0.5 * weight[N // 2].abs().max() / 127  # ties of rounding
    for found, expected in zip(quantize_weight(weight), quantize_weight_reference(weight), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_what_is_not_finite(dtype: torch.dtype) -> None:
    weight = random(6, 48, dtype)
    weight[0], weight[2, 3], weight[4, 47] = 0, torch.nan, -torch.inf
    values, scales = quantize_weight(weight)
    assert not values[[0, 2, 4]].any()
    assert scales.isfinite().tolist() == [True, True, False, True, False, True]
    errors, _ = quantization_errors(weight, values, scales)
    assert errors.isfinite().tolist() == scales.isfinite().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_errors_are_the_norms_of_what_was_changed(N: int, K: int, dtype: torch.dtype) -> None:
    weight = random(N, K, dtype)
    values, scales = quantize_weight(weight)
    restored = values[:, :K].double() * scales.double()[:, None]
    errors, norms = quantization_errors(weight, values, scales)
    torch.testing.assert_close(errors.double(), (weight.double() - restored).norm(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(norms.double(), restored.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_packing_is_the_definitions(N: int, K: int) -> None:
    values, _ = quantize_weight(random(N, K, torch.float32))
    num_rows = -(-N // 64) * 64
    assert torch.equal(pack(values, K, num_rows), pack_reference(values, K, num_rows))


def test_what_does_not_fit_is_refused() -> None:
    values, scales = quantize_weight(random(8, 48, torch.float32))
    with pytest.raises(ValueError, match="must"):
        quantize_weight(random(8, 40, torch.float32))
    with pytest.raises(ValueError, match="must"):
        quantization_errors(random(8, 80, torch.float32), values, scales)
    for columns, rows in ((80, 16), (48, 0), (48, 24)):
        with pytest.raises(ValueError, match="must"):
            pack(values, columns, rows)
