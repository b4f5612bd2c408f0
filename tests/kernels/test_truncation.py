"""Thresholds of top-k, top-p and min-p against sampling.truncation_threshold, in the head and in the row."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cabochon.kernels import sampling
from cabochon.kernels.sampling_state import RowSampling, SamplingState
from cabochon.kernels.scores import open_row
from cabochon.kernels.truncation import (
    KEY_OF_NOTHING,
    MASS_UNIT,
    head_of_row,
    mass_of,
    order_key,
    threshold_of_row,
    value_of,
)

SUB = 4
NUM_ACTIVE = 8
BLOCK = 1024


@triton.jit
def _threshold_kernel(
    logits_ptr, floats_ptr, doubles_ptr, ints_ptr, ids_ptr, bias_ptr, bits_ptr, sub_max_ptr, active_ptr,
    out_ptr, highest_ptr, total_ptr, V, num_dense,
    SUB: tl.constexpr, NUM_ACTIVE: tl.constexpr, BLOCK_SUBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = open_row(
        tl.full([], 0, tl.int64), logits_ptr, floats_ptr, ids_ptr, bias_ptr, ids_ptr, ids_ptr, bits_ptr,
        bits_ptr, 0, 0, 0, tl.load(ints_ptr), 1, 1.0, V, num_dense,
    )  # fmt: skip
    num_subs = num_dense // SUB
    lowest, _, scores = head_of_row(
        row, sub_max_ptr, active_ptr, num_subs, SUB, NUM_ACTIVE, BLOCK_SUBS, False
    )
    smallest = threshold_of_row(
        row, lowest, scores, tl.load(highest_ptr), tl.load(total_ptr), tl.load(ints_ptr + 1),
        tl.load(doubles_ptr), tl.load(doubles_ptr + 1), num_dense, BLOCK, False,
    )  # fmt: skip
    tl.store(out_ptr, smallest)
    tl.store(out_ptr + 1, tl.sum((scores > float("-inf")).to(tl.float32), axis=0))


def ours(scores: torch.Tensor, *, top_k: int, top_p: float, min_p: float) -> tuple[float, int]:
    """The threshold, and the size of the head. scores: [V] fp32, temperature 1 and no cap."""
    V = len(scores)
    state = SamplingState(max_seqs=1, vocab_size=V, max_entries=1, allocate=torch.device("cpu"))
    state.set_row(0, RowSampling(top_k=top_k, top_p=top_p, min_p=min_p))
    num_dense = -(-V // BLOCK) * BLOCK
    padded = torch.full((num_dense,), -torch.inf)
    padded[:V] = scores
    sub_max = padded.view(-1, SUB).amax(1).contiguous()
    highest = scores.max()
    total = ((scores - highest).double().exp().sum() * MASS_UNIT.value).long()
    out = torch.empty(2)
    _threshold_kernel[(1,)](
        scores, state.floats, state.doubles, state.ints, state.entry_ids, state.entry_bias, state.entry_bits,
        sub_max, torch.empty(NUM_ACTIVE, dtype=torch.int32), out, highest, total, V, num_dense,
        SUB=SUB, NUM_ACTIVE=NUM_ACTIVE, BLOCK_SUBS=triton.next_power_of_2(len(sub_max)), BLOCK=BLOCK,
    )  # fmt: skip
    return float(out[0]), int(out[1])


def noise(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def same_survivors(scores: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """Assert the definition's survivors. Returns the size of the head."""
    threshold, head = ours(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = sampling.truncation_threshold(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    theirs = ~(scores < expected)  # as the engine masks
    assert torch.equal(scores >= threshold, theirs)
    return head


@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 9999])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-9])
@pytest.mark.parametrize("min_p", [0.0, 0.01])
def test_survivors_are_the_definitions(top_k: int, top_p: float, min_p: float) -> None:
    """With 8 sub-tiles of 4 as the head, k = 3 is found in it and k = 50 in the row."""
    same_survivors(noise(1000), top_k=top_k, top_p=top_p, min_p=min_p)
    same_survivors(noise(700, seed=3).bfloat16().float(), top_k=top_k, top_p=top_p, min_p=min_p)


@pytest.mark.parametrize("V", [1, 2, 31, 32, 33, 255, 256, 257])
def test_any_vocabulary(V: int) -> None:
    same_survivors(noise(V), top_k=7, top_p=0.9)
    same_survivors(noise(V, 1), top_p=0.5, min_p=0.02)


def test_unused_places_of_the_head_count_nothing() -> None:
    """They read position 0, here the largest score."""
    scores = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0, 4.5, 0.0])
    assert same_survivors(scores, top_k=3) == len(scores)
    assert same_survivors(scores, top_p=0.9) == len(scores)


def test_the_head_is_the_largest_scores_and_no_more_than_it_holds() -> None:
    head = same_survivors(noise(1000), top_k=5)
    assert NUM_ACTIVE <= head <= NUM_ACTIVE * SUB


def test_ties_of_too_many_sub_tiles_leave_no_head_but_the_row() -> None:
    scores = noise(1000)
    scores[::5] = 20.0
    assert same_survivors(scores, top_k=3) == 0
    assert same_survivors(scores, top_p=0.5, min_p=0.1) == 0


def test_equal_scores_all_survive() -> None:
    same_survivors(torch.full((500,), -2.0), top_k=3)
    same_survivors(torch.full((500,), 2.0), top_p=0.5)
    same_survivors(torch.zeros(500), top_k=500, top_p=0.1, min_p=1.0)


@pytest.mark.parametrize("spread", [1e-3, 0.5, 30.0])
def test_flat_and_steep_rows(spread: float) -> None:
    scores = noise(2000) * spread
    scores[::11] = -torch.inf
    same_survivors(scores, top_p=0.999)
    same_survivors(scores, top_k=900, top_p=0.9)


def test_forbidden_tokens_do_not_fill_a_k() -> None:
    scores = torch.full((600,), -torch.inf)
    scores[[3, 300, 599]] = torch.tensor([1.0, 2.0, 3.0])
    threshold, head = ours(scores, top_k=5, top_p=1.0, min_p=0.0)
    assert threshold == -torch.inf
    assert head == 3


@triton.jit
def _keys_kernel(x_ptr, key_ptr, back_ptr, mass_ptr, highest_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(key_ptr + i, order_key(x))
    tl.store(back_ptr + i, value_of(order_key(x)))
    tl.store(mass_ptr + i, mass_of(x, tl.load(highest_ptr)))


@pytest.mark.filterwarnings("ignore:(invalid|overflow|divide)")  # masses of nonsense, unused
def test_keys_order_as_floats_do_and_come_back() -> None:
    x = torch.cat([noise(1000) * 10 ** torch.arange(-30.0, 30.0, 0.06), torch.tensor([0.0, -0.0])])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38])]).repeat(2)[:1024]
    keys, back = torch.empty(1024, dtype=torch.int32), torch.empty(1024)
    _keys_kernel[(1,)](
        x, keys, back, torch.empty(1024, dtype=torch.int64), torch.tensor(math.inf), BLOCK=1024
    )
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))
    order = keys.argsort()
    assert (x[order].diff() >= 0).logical_or(x[order].diff().isnan()).all()
    assert int(keys[x == -math.inf][0]) == KEY_OF_NOTHING.value


def test_masses_are_exponentials_in_small_units() -> None:
    x = torch.linspace(-40, 5, 1024)
    masses = torch.empty(1024, dtype=torch.int64)
    _keys_kernel[(1,)](
        x, torch.empty(1024, dtype=torch.int32), torch.empty(1024), masses, torch.tensor(5.0), BLOCK=1024
    )
    expected = (x - 5).double().exp().numpy() * MASS_UNIT.value
    assert (np.abs(masses.numpy() - expected) <= 1 + 3e-7 * expected).all()
    assert int(masses[-1]) * 2**18 < 2**63
