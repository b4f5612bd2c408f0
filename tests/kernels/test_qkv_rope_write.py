"""Rotated queries and written pages against the torch definitions; fp8 against torch's own cast."""

import pytest
import torch
import triton
import triton.language as tl
from guarded import SENTINEL, far_apart, guarded, noise, poisoned, surroundings_are_untouched

from cabochon.kernels.definitions import rope_table
from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.qkv_rope_write import (
    e4m3_bits,
    qkv_rope_reference,
    qkv_rope_write,
    quantize_heads,
)

P = 4
FP8 = torch.float8_e4m3fn


class Case:
    """T tokens of one step: positions, slots in random order, a qkv row each inside NaN."""

    def __init__(self, T: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype) -> None:
        self.heads = (Hq, Hkv)
        self.qkv = guarded(noise(T, (Hq + 2 * Hkv) * D).to(dtype))
        self.positions = torch.arange(T) * 7 % 50
        self.cos, self.sin = rope_table(50, D, 10_000.0)
        num_slots = (2 * T // P + 2) * P
        self.slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1))[:T]
        self.k_pages = torch.full((num_slots // P, P, Hkv, D), SENTINEL, dtype=dtype)
        self.v_pages = self.k_pages.clone()
        self.q_out = poisoned(T, Hq, D, dtype=dtype)

    def run(self, **options: object) -> None:
        qkv_rope_write(
            self.qkv, self.positions, self.cos, self.sin, self.slots,
            **{"q_out": self.q_out, "k_pages": self.k_pages, "v_pages": self.v_pages} | options,
        )  # fmt: skip

    def reference(self, dtype: torch.dtype | None = None, **norms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        tables = self.cos.to(angle_dtype), self.sin.to(angle_dtype)
        norms = {name: weight.to(angle_dtype) for name, weight in norms.items()}
        qkv = self.qkv if dtype is None else self.qkv.to(dtype)
        return qkv_rope_reference(qkv, self.positions, *tables, self.heads, eps=1e-6, **norms)

    def written(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_out, *(pages.flatten(0, 1)[self.slots] for pages in (self.k_pages, self.v_pages))


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize(
    ("Hq", "Hkv", "D", "dtype"),
    [
        (4, 1, 256, torch.bfloat16),
        (4, 1, 256, torch.float32),
        (4, 2, 128, torch.bfloat16),
        (2, 2, 64, torch.float16),
    ],
)
@pytest.mark.parametrize("has_norm", [False, True])
def test_matches_the_definition(
    T: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype, has_norm: bool
) -> None:
    case = Case(T, Hq, Hkv, D, dtype)
    norms = {"q_norm": 1 + noise(D, seed=2), "k_norm": 1 + noise(D, seed=3)} if has_norm else {}
    case.run(eps=1e-6, **norms)
    if T:
        low, truth = case.reference(**norms), case.reference(torch.float64, **norms)
        for mine, theirs, exact in zip(case.written()[:2], low, truth, strict=False):
            assert_within_budget(mine, theirs, exact)
        assert torch.equal(case.written()[2], low[2])
    assert surroundings_are_untouched(case.q_out)


def test_every_rounding_is_the_definitions() -> None:
    case = Case(60, 2, 1, 128, torch.bfloat16)
    norms = {"q_norm": 1 + noise(128, seed=2), "k_norm": 1 + noise(128, seed=3)}
    case.run(eps=1e-6, **norms)
    for mine, theirs in zip(case.written(), case.reference(**norms), strict=True):
        assert (mine != theirs).float().mean() < 2e-3  # a normalized bf16 may round apart, then turns


def test_only_the_slots_of_the_tokens_are_written() -> None:
    case = Case(7, 2, 2, 64, torch.float32)
    case.slots[[0, 3, 6]] = -1
    case.run()
    untouched = torch.ones(case.k_pages.shape[0] * P, dtype=torch.bool)
    untouched[case.slots[case.slots >= 0]] = False
    assert (case.k_pages.flatten(0, 1)[untouched] == SENTINEL).all()
    assert (case.v_pages.flatten(0, 1)[untouched] == SENTINEL).all()
    assert (case.k_pages.flatten(0, 1)[~untouched] != SENTINEL).all()
    assert torch.isfinite(case.q_out).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [64, 256])
def test_fp8_pages_hold_the_quantized_heads(dtype: torch.dtype, D: int) -> None:
    case = Case(7, 2, 2, D, dtype)
    case.qkv[2] = 0  # rows of nothing, and of next to nothing
    case.qkv[3] *= 1e-20
    case.slots[5] = -1
    pages = [torch.zeros(case.k_pages.shape, dtype=FP8) for _ in range(2)]
    scales = [torch.full(case.k_pages.shape[:3], SENTINEL) for _ in range(2)]
    case.run(k_pages=pages[0], v_pages=pages[1], k_scales=scales[0], v_scales=scales[1])
    is_token = case.slots >= 0
    slots = case.slots[is_token]
    plain = Case(7, 2, 2, D, dtype)
    plain.qkv.copy_(case.qkv)
    plain.run()
    for index, kept in enumerate(plain.written()[1:]):
        values, expected = quantize_heads(kept[is_token])
        assert torch.equal(pages[index].flatten(0, 1)[slots].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(scales[index].flatten(0, 1)[slots], expected)
        untouched = torch.ones(scales[index].shape[0] * P, dtype=torch.bool)
        untouched[slots] = False
        assert (scales[index].flatten(0, 1)[untouched] == SENTINEL).all()
        assert not pages[index].flatten(0, 1)[untouched].view(torch.uint8).any()


@triton.jit
def _bits_kernel(x_ptr, bits_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(bits_ptr + i, e4m3_bits(tl.load(x_ptr + i)))


def test_e4m3_is_torchs_for_every_half_and_around_every_tie() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = halves[halves.isfinite() & (halves.abs() <= 448)]
    x = torch.cat([x, x.nextafter(torch.tensor(1e9)), x.nextafter(torch.tensor(-1e9)), noise(4096, gain=100)])
    x = x[x.abs() <= 448]
    x = x[: len(x) // 1024 * 1024].contiguous()
    bits = torch.empty(len(x), dtype=torch.uint8)
    _bits_kernel[(len(x) // 1024,)](x, bits, BLOCK=1024)
    assert torch.equal(bits, x.to(FP8).view(torch.uint8))


def test_strided_pages_and_queries() -> None:
    plain, case = Case(5, 2, 2, 64, torch.float32), Case(5, 2, 2, 64, torch.float32)
    memory = torch.full((2, len(case.k_pages), P + 1, 2, 80), SENTINEL)
    case.k_pages, case.v_pages = memory[:, :, :P, :, :64]
    case.q_out = torch.full((5, 3, 70), SENTINEL)[:, :2, :64]
    plain.run()
    case.run()
    for mine, theirs in zip(case.written(), plain.written(), strict=True):
        assert torch.equal(mine, theirs)
    assert (memory[:, :, P] == SENTINEL).all()
    assert (memory[..., 64:] == SENTINEL).all()


def test_offsets_pass_2_to_the_31() -> None:
    """The third page starts at element 2^31."""
    case, far = Case(3, 1, 1, 64, torch.bfloat16), Case(3, 1, 1, 64, torch.bfloat16)
    case.slots = far.slots = torch.tensor([2 * P + 3, P, 2])
    qkv = far_apart(3, 3 * 64, torch.bfloat16)
    qkv.copy_(case.qkv)
    far.qkv = qkv
    far.k_pages, far.v_pages = (
        far_apart(3, P * 64, torch.bfloat16).unflatten(1, (P, 1, 64)) for _ in range(2)
    )
    case.run()
    far.run()
    assert torch.equal(far.q_out, case.q_out)
    for mine, theirs in ((far.k_pages, case.k_pages), (far.v_pages, case.v_pages)):
        for slot in far.slots.tolist():
            assert torch.equal(mine[slot // P, slot % P], theirs[slot // P, slot % P])


def test_a_token_is_bitwise_the_same_in_any_batch() -> None:
    whole, alone = Case(9, 2, 1, 64, torch.float32), Case(9, 2, 1, 64, torch.float32)
    alone.qkv, alone.positions, alone.slots = alone.qkv[5:6], alone.positions[5:6], alone.slots[5:6]
    alone.q_out = alone.q_out[5:6]
    whole.run()
    alone.run()
    assert torch.equal(alone.q_out[0], whole.q_out[5])
    assert torch.equal(alone.written()[1][0], whole.written()[1][5])


def wrong_inputs() -> dict[str, tuple[dict[str, object], str]]:
    pages = torch.zeros(4, P, 1, 64)
    return {
        "narrow qkv": ({"qkv": torch.zeros(3, 64)}, "qkv must be"),
        "int32 slots": ({"slots": torch.zeros(3, dtype=torch.int32)}, r"positions and slots must be \[3\]"),
        "fp8 without scales": ({"k_pages": pages.to(FP8), "v_pages": pages.to(FP8)}, "k_scales and v_scales"),
        "mixed pages": ({"v_pages": pages.to(FP8)}, "pages must be torch.float32 or e4m3"),
        "page shapes": ({"v_pages": pages[:3]}, "the same shape and strides"),
        "one norm": ({"q_norm": torch.ones(64)}, "q_norm and k_norm go together"),
        "table": ({"cos": torch.zeros(50, 16)}, r"cos and sin must be \[max_len, 32\]"),
        "transposed": ({"q_out": torch.zeros(3, 64, 2).mT[:, :1]}, "last axis"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_inputs_that_disagree_are_told(name: str) -> None:
    wrong, message = wrong_inputs()[name]
    inputs = {
        "qkv": torch.zeros(3, 3 * 64), "positions": torch.zeros(3, dtype=torch.int64),
        "cos": torch.zeros(50, 32), "sin": torch.zeros(50, 32), "slots": torch.zeros(3, dtype=torch.int64),
        "q_out": torch.zeros(3, 1, 64), "k_pages": torch.zeros(4, P, 1, 64),
        "v_pages": torch.zeros(4, P, 1, 64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        qkv_rope_write(**(inputs | wrong))
