"""The LoRA kernels in Triton's interpreter against the fp64 definition, and themselves bit for bit."""

from typing import Any

import pytest
import torch
from guarded import far_apart, noise, surroundings_are_untouched
from lora_case import MIXED, RANKS, LoraCase, make_case, make_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from cabochon.kernels import lora
from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.lora import add_lora, scratch_words
from cabochon.kernels.lora_definition import TILE_ROWS, LoraWeights, add_lora_reference

DTYPES = [torch.float32, torch.bfloat16]


def poisoned_scratch(x: Tensor, weights: LoraWeights, more: int = 0) -> Tensor:
    words = scratch_words(len(x), len(weights.part_ends), weights.b.shape[2])
    return torch.full((words + more,), torch.nan)


def added(
    x: Tensor, out: Tensor, weights: LoraWeights, tiles: Tensor, tile_rows: int = 16, more: int = 0
) -> Tensor:
    """What becomes of `out`, which stays as it is."""
    result = out.clone()
    scratch = poisoned_scratch(x, weights, more)
    add_lora(x, weights, tiles, tile_rows=tile_rows, scratch=scratch, out=result)
    return result


def assert_equals_the_definition(case: LoraCase, tile_rows: int = 16) -> None:
    """In place, without a trace around."""
    tiles = case.tiles(tile_rows)
    wide, low = case.wide(), case.out.clone()
    add_lora_reference(wide.x, wide.weights, tiles, out=wide.out)
    add_lora_reference(case.x, case.weights, tiles, out=low)
    scratch = poisoned_scratch(case.x, case.weights)
    add_lora(case.x, case.weights, tiles, tile_rows=tile_rows, scratch=scratch, out=case.out)
    assert_within_budget(case.out, low, wide.out)
    assert surroundings_are_untouched(case.out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
@pytest.mark.parametrize(("K", "sizes"), [(520, (48,)), (40, (64, 64)), (72, (96, 16, 32))])
def test_equals_the_definition_on_a_mixed_batch(
    K: int, sizes: tuple[int, ...], tile_rows: int, dtype: torch.dtype
) -> None:
    assert_equals_the_definition(make_case(K, sizes, dtype=dtype), tile_rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 16, 511, 512, 513, 2304])
def test_rows_of_any_length(K: int, dtype: torch.dtype) -> None:
    assert_equals_the_definition(make_case(K, (32, 16), ((0, 2), (2, 1), (3, 2)), dtype=dtype))


@pytest.mark.parametrize(
    ("K", "sizes"),
    [(2304, (2048, 1024, 1024)), (640, (1024, 256, 256)), (640, (2048, 2048)), (2048, (640,))],
    ids=["2B qkv", "270M qkv", "270M gate_up", "270M down"],
)
def test_the_layers_of_models(K: int, sizes: tuple[int, ...]) -> None:
    assert_equals_the_definition(make_case(K, sizes, ((3, 2), (0, 3)), dtype=torch.bfloat16))


@pytest.mark.parametrize("R", [4, 16, 24, 64])
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_slots_of_any_rank(R: int, tile_rows: int) -> None:
    case = make_case(40, (32, 16), ((0, 3), (1, 2), (2, 20)), ranks=(R, 1, R - 1), R=R, dtype=torch.bfloat16)
    assert_equals_the_definition(case, tile_rows)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_runs_around_a_tile(rows: int, tile_rows: int) -> None:
    assert_equals_the_definition(make_case(40, (32,), ((0, rows), (3, 2))), tile_rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_rows_of_no_tile_and_of_rank_0_stay_bit_for_bit(tile_rows: int, dtype: torch.dtype) -> None:
    """−0 too, which a sum with 0 would turn into 0, as the sign shows."""
    case = make_case(40, (32, 16), dtype=dtype)
    case.out[:, ::3] = -0.0
    result = added(case.x, case.out, case.weights, case.tiles(tile_rows), tile_rows)
    slots = torch.tensor([slot for slot, rows in MIXED for _ in range(rows)] + [-1] * 3)
    changes = (slots >= 0) & (torch.tensor([*RANKS, 0])[slots] > 0)
    assert torch.equal(result[~changes], case.out[~changes])
    assert torch.equal(result[~changes].signbit(), case.out[~changes].signbit())
    assert (result[changes] != case.out[changes]).any(1).all()


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_padding_tiles_do_nothing(tile_rows: int) -> None:
    """As a CUDA graph has them, whatever rows they name."""
    case = make_case(40, (32, 16))
    tiles = case.tiles(tile_rows)
    padding = torch.tensor([[-1, 0, 0], [-1, 2, 9], [-1, -1, -1]], dtype=torch.int32)
    padded = torch.cat([padding[:1], tiles, padding[1:]])
    together = added(case.x, case.out, case.weights, tiles, tile_rows)
    assert torch.equal(added(case.x, case.out, case.weights, padded, tile_rows), together)
    assert torch.equal(added(case.x, case.out, case.weights, padding, tile_rows), case.out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_a_row_has_the_same_bits_alone_and_among_others(tile_rows: int, dtype: torch.dtype) -> None:
    """Nor do they depend on its place in a tile, the length of the batch or of the scratch."""
    case = make_case(520, (32, 16), ((0, 3), (-1, 2), (2, 20), (3, 7), (4, 1)), dtype=dtype)
    together = added(case.x, case.out, case.weights, case.tiles(tile_rows), tile_rows)
    row = 0
    for slot, rows in case.sequences:
        for t in {row, row + rows // 2, row + rows - 1} if slot >= 0 else ():
            one, tile = slice(t, t + 1), torch.tensor([[slot, 0, 1]], dtype=torch.int32)
            alone = added(case.x[one].clone(), case.out[one], case.weights, tile, tile_rows, more=7)
            assert torch.equal(alone, together[one])
        row += rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stands_beyond_a_rank_never_counts(dtype: torch.dtype) -> None:
    case = make_case(40, (32, 16), tuple((slot, 2) for slot in range(5)), dtype=dtype)
    expected = added(case.x, case.out, case.weights, case.tiles(16))
    for stale in (0.0, torch.inf, 1e30):
        weights = make_weights(40, (32, 16), dtype=dtype, stale=stale)
        assert torch.equal(added(case.x, case.out, weights, case.tiles(16)), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_shows_and_leaves_its_neighbours_alone(bad: float) -> None:
    case = make_case(40, (32, 16), ((0, 5),))
    expected = added(case.x, case.out, case.weights, case.tiles(16))
    case.x[2, 7] = bad
    result = added(case.x, case.out, case.weights, case.tiles(16))
    assert not result[2].isfinite().any()
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_bf16_rounds_between_the_products_and_once_at_the_end(tile_rows: int) -> None:
    """257 is no bf16: 256. 1 + 2⁻¹⁰ is none either, but is not rounded before 256 is added: 258, not 256."""
    b = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0**-10]]).repeat_interleave(16, 0)
    a = torch.zeros(4, 3)
    a[0], a[1, 0], a[2, 0], a[3, 0] = torch.tensor([256.0, 1.0, 0.0]), 256.0, 1.0, 1.0
    weights = LoraWeights(a[None].bfloat16(), b[None].bfloat16(), torch.tensor([4], dtype=torch.int32), (32,))
    x, out = torch.ones(1, 3).bfloat16(), torch.tensor([[0.0, 256.0]]).repeat_interleave(16, 1).bfloat16()
    result = added(x, out, weights, torch.tensor([[0, 0, 1]], dtype=torch.int32), tile_rows)
    assert result[0].tolist() == [0.0] * 16 + [258.0] * 16


def test_every_piece_of_k_counts_once() -> None:
    """Ones: the sums are whole numbers, so exact."""
    for K in (640, 2304, 14336):
        weights = LoraWeights(
            torch.ones(1, 2, K), torch.ones(1, 16, 2), torch.tensor([2], dtype=torch.int32), (16,)
        )
        tile = torch.tensor([[0, 0, 1]], dtype=torch.int32)
        assert (added(torch.ones(1, K), torch.ones(1, 16), weights, tile) == 2 * K + 1).all()


@pytest.mark.parametrize("K", [1, 16, 640, 2048, 2304, 3584, 4096, 4608, 9216, 14336, 36864, 100_000])
def test_pieces_are_whole_tiles_few_and_none_is_empty(K: int) -> None:
    piece_len = lora._piece_len(K)
    num_pieces = -(-K // piece_len)
    assert 1 <= num_pieces <= lora.MAX_PIECES
    assert (num_pieces - 1) * piece_len < K
    blocks = [lora._blocks(tile_rows, dtype) for tile_rows in TILE_ROWS for dtype in DTYPES]
    assert {piece_len % one.block_k for one in blocks} == {0}


@pytest.mark.parametrize(
    ("part_ends", "expected"),
    [((4096, 6144, 8192), 128), ((1024, 1280, 1536), 128), ((640,), 128), ((96, 112, 144), 16), ((48,), 16)],
)
def test_no_tile_of_columns_has_two_parts(part_ends: tuple[int, ...], expected: int) -> None:
    assert lora._block_n(part_ends, 128) == expected
    assert all(end % expected == 0 for end in part_ends)


def test_offsets_pass_2_to_the_31() -> None:
    case = make_case(40, (32, 16), ((0, 1), (-1, 1), (2, 2)), dtype=torch.bfloat16)
    tiles = case.tiles(16)
    expected = added(case.x, case.out, case.weights, tiles)
    a, b, ranks, part_ends = case.weights
    x, out = far_apart(7, 40, torch.bfloat16), far_apart(7, 48, torch.bfloat16)
    far_a, far_b = far_apart(5, a[0].numel(), torch.bfloat16), far_apart(5, b[0].numel(), torch.bfloat16)
    for far, near in ((x, case.x), (out, case.out), (far_a, a.flatten(1)), (far_b, b.flatten(1))):
        far.copy_(near)
    weights = LoraWeights(far_a.unflatten(1, a.shape[1:]), far_b.unflatten(1, b.shape[1:]), ranks, part_ends)
    add_lora(x, weights, tiles, tile_rows=16, scratch=poisoned_scratch(x, weights), out=out)
    assert torch.equal(out.clone(), expected)


def test_nothing_to_do_is_fine() -> None:
    case = make_case(40, (32,), ((-1, 2),))
    assert torch.equal(added(case.x, case.out, case.weights, case.tiles(16)), case.out)
    assert added(case.x[:0], case.out[:0], case.weights, case.tiles(16)).shape == (0, 32)


class Operators(TorchDispatchMode):
    """Which operators of torch were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_it_is_two_launches_whose_grids_are_known_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[str, tuple[int, ...]]] = []

    def launch(kernel: Any, *_: object, grid: tuple[int, ...], **__: object) -> None:
        launches.append((kernel.fn.__name__, grid))

    case = make_case(2304, (128, 64), dtype=torch.bfloat16)
    tiles, scratch = case.tiles(64), poisoned_scratch(case.x, case.weights)
    monkeypatch.setattr(InterpretedFunction, "run", launch)
    with Operators() as operators:
        add_lora(case.x, case.weights, tiles, tile_rows=64, scratch=scratch, out=case.out)
    assert launches == [("_shrink_kernel", (2 * 2, 3, len(tiles))), ("_expand_kernel", (3, len(tiles)))]
    assert operators.names == []


def refused(case: LoraCase, message: str, **changed: Any) -> None:
    fitting: dict[str, Any] = {
        "x": case.x, "weights": case.weights, "tiles": case.tiles(16), "tile_rows": 16,
        "scratch": poisoned_scratch(case.x, case.weights), "out": case.out,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        add_lora(**fitting | changed)


def test_what_does_not_fit_is_told() -> None:
    case = make_case(40, (32, 16), ((0, 2),))
    weights, tiles = case.weights, case.tiles(16)
    refused(case, r"with P = 2, K = 39 and T' = 5, got \[\[5, 128, 40\]", x=case.x[:, :-1])
    refused(case, r"\[S, P · R, K\], .* \[\[5, 127, 40\], ", weights=weights._replace(a=weights.a[:, 1:]))
    refused(case, r"\[5\], \[4, 48\]\]", out=case.out[:4])
    refused(case, r"\[4\], \[5, 48\]\]", weights=weights._replace(ranks=weights.ranks[:4]))
    refused(case, "out must be torch.float32 as x is, got .* torch.bfloat16", out=case.out.bfloat16())
    refused(case, "must be contiguous, got strides", x=noise(40, 5).t())
    refused(case, "must be contiguous, got strides", weights=weights._replace(a=weights.a.mT.contiguous().mT))
    for ends in ((32, 40), (40, 48), (48, 32, 48), (0, 48), (16, 16, 32, 48)):
        wrong = make_weights(40, (48,) * len(ends))._replace(b=weights.b, part_ends=ends)
        refused(case, "part_ends must be 1 to 3 ascending multiples of 16, the last N = 48", weights=wrong)
    refused(case, r"tile_rows must be one of \(16, 64\), got 48: cut tiles", tile_rows=48)
    refused(case, r"contiguous int32, got \[1, 3\] torch.int64", tiles=tiles.long())
    refused(case, r"contiguous int32, got \[3\] torch.int32", tiles=tiles[0])
    refused(case, "and torch.int64", weights=weights._replace(ranks=weights.ranks.long()))
    refused(case, r"scratch must be 2560 contiguous fp32 numbers or more, got \[2559\]",
            scratch=torch.zeros(2559))  # fmt: skip
    refused(case, "or more, got .* torch.bfloat16", scratch=torch.zeros(5000).bfloat16())
