"""Adapters in C against the fp64 definition, and themselves bit for bit, in every library this CPU runs."""

import pytest
import torch
from guarded import SENTINEL
from lora_case import MIXED, RANKS, LoraCase, make_case
from torch import Tensor

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.lora_definition import add_lora_reference
from cabochon.kernels.native.lora import NativeLora, NativeLoraWeights, add_lora

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("build")


def packed(case: LoraCase) -> NativeLoraWeights:
    a, b, ranks, part_ends = case.weights
    weights = NativeLoraWeights(len(ranks), case.x.shape[1], part_ends, a.dtype)
    stacked = a.view(len(a), len(part_ends), -1, a.shape[2])
    for slot, rank in enumerate(ranks.tolist()):
        if rank:
            one = NativeLora(stacked[slot, :, :rank].contiguous(), b[slot, :, :rank].t().contiguous())
            weights.put(slot, one)
    return weights


def added(x: Tensor, out: Tensor, weights: NativeLoraWeights, tiles: Tensor) -> Tensor:
    """What becomes of `out`, which stays as it is; nothing is written around it."""
    memory = torch.full((out.numel() + 128,), SENTINEL, dtype=out.dtype)
    result = memory[64:-64].view(out.shape).copy_(out)
    add_lora(x.contiguous(), weights, tiles, out=result)
    assert (memory[:64] == SENTINEL).all()
    assert (memory[-64:] == SENTINEL).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_rows", [1, 16, 64])
@pytest.mark.parametrize(
    ("K", "sizes"), [(16, (48,)), (640, (64, 64)), (48, (96, 16, 32)), (640, (1024, 256, 256))]
)
def test_equals_the_definition_on_a_mixed_batch(
    K: int, sizes: tuple[int, ...], tile_rows: int, dtype: torch.dtype
) -> None:
    case = make_case(K, sizes, dtype=dtype)
    tiles, wide, low = case.tiles(tile_rows), case.wide(), case.out.clone()
    got = added(case.x, case.out, packed(case), tiles)
    add_lora_reference(wide.x, wide.weights, tiles, out=wide.out)
    add_lora_reference(case.x, case.weights, tiles, out=low)
    used = len(case.x) - 3  # behind stand NaN of no sequence
    assert_within_budget(got[:used], low[:used], wide.out[:used])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_tile_and_of_rank_0_stay_bit_for_bit(dtype: torch.dtype) -> None:
    """−0 too, which a sum with 0 would turn into 0, as the sign shows."""
    case = make_case(48, (32, 16), dtype=dtype)
    case.out[:, ::3] = -0.0
    padding = torch.tensor([[-1, 0, 0], [-1, 2, 9], [-1, -1, -1]], dtype=torch.int32)
    result = added(case.x, case.out, packed(case), torch.cat([padding, case.tiles(16)]))
    slots = torch.tensor([slot for slot, rows in MIXED for _ in range(rows)] + [-1] * 3)
    changes = (slots >= 0) & (torch.tensor([*RANKS, 0])[slots] > 0)
    assert torch.equal(result[~changes], case.out[~changes])
    assert torch.equal(result[~changes].signbit(), case.out[~changes].signbit())
    assert (result[changes] != case.out[changes]).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_by_any_thread(dtype: torch.dtype) -> None:
    case = make_case(640, (512, 64), ((0, 3), (-1, 2), (2, 41), (3, 7), (4, 1)), dtype=dtype)
    weights, tiles = packed(case), case.tiles(16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = added(case.x, case.out, weights, tiles)
        torch.set_num_threads(1)
        assert torch.equal(added(case.x, case.out, weights, tiles), together)
    finally:
        torch.set_num_threads(threads)
    row = 0
    for slot, rows in case.sequences:
        for t in {row, row + rows // 2, row + rows - 1} if slot >= 0 else ():
            alone = torch.tensor([[slot, 0, 1]], dtype=torch.int32)
            got = added(case.x[t : t + 1], case.out[t : t + 1], weights, alone)
            assert torch.equal(got[0], together[t])
        row += rows


def test_a_slot_is_filled_and_emptied() -> None:
    case = make_case(48, (32, 16), ((0, 2),))
    weights, tiles = packed(case), case.tiles(16)
    once = added(case.x, case.out, weights, tiles)
    held = weights._slots[0]
    weights.put(0, None)
    assert torch.equal(added(case.x, case.out, weights, tiles), case.out)
    weights.put(0, held)
    assert torch.equal(added(case.x, case.out, weights, tiles), once)


def test_what_does_not_fit_is_refused() -> None:
    case = make_case(48, (32, 16), ((0, 2),))
    weights, tiles = packed(case), case.tiles(16)
    x, out = case.x.contiguous(), case.out.contiguous()
    with pytest.raises(ValueError, match="must fit"):
        add_lora(x, weights, tiles, out=out[:, :32].contiguous())
    with pytest.raises(ValueError, match="must fit"):
        add_lora(x[:, :32].contiguous(), weights, tiles, out=out)
    with pytest.raises(ValueError, match="must fit"):
        add_lora(x.bfloat16(), weights, tiles, out=out)
    with pytest.raises(ValueError, match=r"tiles must be a contiguous \[n, 3\] int32"):
        add_lora(x, weights, tiles.long(), out=out)
    with pytest.raises(ValueError, match="sizes must be multiples of 16"):
        NativeLoraWeights(1, 40, (32,), torch.float32)
    with pytest.raises(ValueError, match="must fit"):
        weights.put(1, NativeLora(torch.zeros(3, 4, 48), torch.zeros(4, 48)))
