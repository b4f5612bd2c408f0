"""What the attention kernels refuse, each with its message, and the constants of their softmax."""

import math
from typing import Any

import pytest
import torch

from cabochon.kernels.paged_inputs import check_pages, element_types, softmax_constants

E4M3 = torch.float8_e4m3fn


def arguments(**changed: Any) -> dict[str, Any]:
    """One sequence, two heads over one, D = 16, P = 4."""
    pages = torch.zeros(3, 4, 1, 16)
    return {
        "q": torch.zeros(1, 2, 16), "k_pages": pages, "v_pages": pages, "page_table": torch.zeros(1, 2).int(),
        "seq_lens": torch.ones(1).int(), "k_scales": None, "v_scales": None, **changed,
    }  # fmt: skip


def test_what_fits_is_taken() -> None:
    check_pages(**arguments())
    pages, scales = torch.zeros(3, 4, 1, 16).to(E4M3), torch.ones(3, 4, 1)
    check_pages(**arguments(k_pages=pages, v_pages=pages, k_scales=scales, v_scales=scales))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(1, 2, 24)}, "head_dim must be a power of two ≥ 16 and the pages', got 24 and 16"),
        ({"q": torch.zeros(1, 2, 32)}, "got 32 and 16"),
        (
            {"k_pages": torch.zeros(3, 4, 2, 16), "q": torch.zeros(1, 3, 16)},
            "Hq must be a multiple of Hkv = 2",
        ),
        ({"k_pages": torch.zeros(4, 4, 1, 16)}, "k_pages and v_pages must have the same shape and strides"),
        ({"q": torch.zeros(1, 2, 32)[:, :, ::2]}, "the last axis of q"),
        ({"page_table": torch.zeros(2, 2).int()}, "page_table must have S = 1 rows, got 2"),
        ({"q": torch.zeros(1, 2, 16).double()}, "q must be bf16, fp16 or fp32, got torch.float64"),
        ({"q": torch.zeros(1, 2, 16).half()}, "pages must be torch.float16 or e4m3, got torch.float32"),
        ({"k_scales": torch.ones(3, 4, 1)}, "pages in torch.float32 have no scales"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pages(**arguments(**changed))


def test_strides_between_rows_of_d_are_named() -> None:
    pages = torch.zeros(3, 4, 1, 24)[..., :16]
    with pytest.raises(ValueError, match="strides of k_pages must be multiples of D = 16"):
        check_pages(**arguments(k_pages=pages, v_pages=pages))


@pytest.mark.parametrize("scales", [None, torch.ones(3, 4), torch.ones(3, 4, 1).double()])
def test_e4m3_pages_need_their_scales(scales: torch.Tensor | None) -> None:
    pages = torch.zeros(3, 4, 1, 16).to(E4M3)
    with pytest.raises(ValueError, match=r"e4m3 pages need k_scales and v_scales \[3, 4, 1\] in fp32"):
        check_pages(**arguments(k_pages=pages, v_pages=pages, k_scales=torch.ones(3, 4, 1), v_scales=scales))


def test_scales_have_the_same_strides() -> None:
    pages, scales = torch.zeros(3, 4, 1, 16).to(E4M3), torch.ones(3, 4, 1)
    other = torch.ones(3, 8, 1)[:, ::2]
    with pytest.raises(ValueError, match="k_scales and v_scales must have the same strides"):
        check_pages(**arguments(k_pages=pages, v_pages=pages, k_scales=scales, v_scales=other))


def test_a_cap_bounds_the_scores_and_half_precision_does_not_hold_their_exponentials() -> None:
    capped = softmax_constants(0.0625, 50.0, torch.bfloat16)
    assert capped == (0.00125, 50 * math.log2(math.e), True)
    assert not softmax_constants(0.0625, 50.0, torch.float16).is_static
    assert softmax_constants(0.0625, None, torch.bfloat16) == (1.0, 0.0625 * math.log2(math.e), False)


def test_e4m3_pages_come_as_bytes_before_sm_90() -> None:
    assert element_types(8, 90) == ("*bf16", "*fp8e4nv", "*fp32")
    assert element_types(8, 89) == element_types(8, 80) == ("*bf16", "*u8", "*fp32")
    assert element_types(16, 80) == ("*bf16", "*bf16", None)
