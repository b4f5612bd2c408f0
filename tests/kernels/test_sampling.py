"""Noise: known values, distribution, independence. Truncation: the same sets as numpy. Draws: chi-square."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cabochon.kernels.sampling import (
    GUMBEL_MAX,
    gumbel,
    gumbel_argmax,
    hash32,
    mix64,
    penalize_,
    truncation_threshold,
)

ALPHA = 1e-4  # seeds are fixed: a pass stays a pass


def noise(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def reference_hash(seed: int, position: int, token: int) -> int:
    """The docstring's definition in Python integers."""
    key = mix64((seed + mix64(position)) % 2**64)

    def mix32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    return mix32(mix32((token * 0x9E3779B1 + key % 2**32) % 2**32) ^ (key >> 32))


def test_mix64_is_splitmix64() -> None:
    assert mix64(0) == 0xE220A8397B1DCDAF  # first output of the published generator for seed 0


def test_the_hash_never_changes() -> None:
    assert hash32(42, 7, torch.tensor([0, 1, 262143])).tolist() == [1443949880, 2189265194, 3491653637]


def test_the_hash_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    for seed, position, token in rng.integers(0, [2**63 - 1, 2**20, 2**18], (200, 3)).tolist():
        assert hash32(seed, position, torch.tensor([token])).item() == reference_hash(seed, position, token)


@pytest.mark.parametrize("varied", ["seed", "position", "token"])
def test_the_hash_is_uniform_along_each_coordinate(varied: str) -> None:
    n = 16384
    if varied == "token":
        h = hash32(3, 5, torch.arange(n)).numpy()
    else:
        at = {"seed": 3, "position": 5}
        h = np.array([hash32(**(at | {varied: i}), token_ids=torch.tensor([9])).item() for i in range(n)])
    for bits in (h >> 24, h & 255):
        assert stats.chisquare(np.bincount(bits, minlength=256)).pvalue > ALPHA
    assert abs(np.corrcoef(h[:-1], h[1:])[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("neighbour", [{"seed": 4}, {"position": 6}, {"seed": 4, "position": 4}], ids=str)
def test_draws_of_neighbouring_seeds_and_positions_are_independent(neighbour: dict[str, int]) -> None:
    at, ids = {"seed": 3, "position": 5}, torch.arange(65536)
    mine, theirs = hash32(**at, token_ids=ids), hash32(**(at | neighbour), token_ids=ids)
    for shift in (28, 0):
        pairs = ((mine >> shift) & 15) * 16 + ((theirs >> shift) & 15)
        assert stats.chisquare(torch.bincount(pairs, minlength=256).numpy()).pvalue > ALPHA


def test_noise_is_its_formula() -> None:
    ids = torch.arange(5000)
    v = (hash32(8, 9, ids).double() + 0.5) * 2.0**-32
    torch.testing.assert_close(gumbel(8, 9, ids), (-(-torch.log1p(-v)).log()).float(), rtol=1e-5, atol=1e-6)


def test_noise_is_gumbel() -> None:
    g = gumbel(1, 2, torch.arange(200_000)).double().numpy()
    assert stats.kstest(g, "gumbel_r").pvalue > ALPHA
    assert np.isfinite(g).all()


def test_noise_has_the_stated_bound() -> None:
    v = torch.tensor([0.5 * 2.0**-32])
    assert -math.log(-math.log1p(-v.item())) < GUMBEL_MAX - 0.1


def test_noise_of_a_token_does_not_depend_on_which_others_are_asked() -> None:
    whole = gumbel(5, 6, torch.arange(5000))
    for ids in (torch.tensor([17]), torch.arange(3, 4999, 7), torch.arange(1000, 1019)):
        assert torch.equal(gumbel(5, 6, ids), whole[ids])


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 30.0])
def test_pruning_never_changes_the_winner(spread: float) -> None:
    scaled = noise(5000) * spread
    for position in range(200):
        plain = int((scaled + gumbel(9, position, torch.arange(5000))).argmax())
        assert gumbel_argmax(scaled, 9, position) == plain


@pytest.mark.parametrize("height", [1e3, 1e6, 3e7, 3e8])
def test_pruning_never_changes_the_winner_where_fp32_is_coarse(height: float) -> None:
    ids = torch.arange(2000)
    scaled = height + torch.rand(2000, generator=torch.Generator().manual_seed(1)) * max(60, height * 2e-7)
    for position in range(100):
        plain = int((scaled + gumbel(9, position, ids)).argmax())  # with many ties: the lowest id
        assert gumbel_argmax(scaled, 9, position) == plain


def test_a_forbidden_token_never_wins() -> None:
    scaled = torch.full((50,), -torch.inf)
    scaled[[3, 7]] = torch.tensor([0.0, -5.0])
    assert {gumbel_argmax(scaled, 0, i) for i in range(2000)} == {3, 7}


def test_draws_follow_the_softmax() -> None:
    scaled = noise(20) / 2
    drawn = np.bincount([gumbel_argmax(scaled, s, p) for s in range(40) for p in range(250)], minlength=20)
    expected = scaled.double().softmax(0).numpy() * drawn.sum()
    assert stats.chisquare(drawn, expected).pvalue > ALPHA


def numpy_survivors(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    scaled = scaled.astype(np.float64)
    order = np.sort(scaled)[::-1]
    alive = scaled >= order[min(top_k, len(order)) - 1] if top_k else np.ones(len(scaled), bool)
    p = np.where(alive, np.exp(scaled - order[0]), 0)
    p /= p.sum()
    if top_p < 1:
        by_value = np.argsort(-scaled, kind="stable")
        inside = int(np.searchsorted(np.cumsum(p[by_value]), top_p))
        alive &= scaled >= scaled[by_value[min(inside, len(scaled) - 1)]]
    if min_p:
        alive &= p >= min_p * p.max()
    return set(np.flatnonzero(alive).tolist())


@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 9999])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.3, 1e-9])
@pytest.mark.parametrize("min_p", [0.0, 0.01, 1.0])
def test_survivors_are_numpys(top_k: int, top_p: float, min_p: float) -> None:
    for seed in range(4):
        scaled = noise(1000, seed) / (1 + seed)
        if seed == 3:
            scaled = scaled.round()  # many ties
        threshold = truncation_threshold(scaled, top_k=top_k, top_p=top_p, min_p=min_p)
        ours = set((scaled >= threshold).nonzero().view(-1).tolist())
        assert ours == numpy_survivors(scaled.numpy(), top_k, top_p, min_p)


@pytest.mark.parametrize("spread", [1e-3, 0.5, 3.0])
@pytest.mark.parametrize("top_k", [0, 9000])
def test_a_nucleus_too_large_to_sort_is_numpys(spread: float, top_k: int) -> None:
    scaled = noise(20_000) * spread
    scaled[: len(scaled) // 2] = scaled[: len(scaled) // 2].round(decimals=4)  # ties
    scaled[::11] = -torch.inf
    for top_p in (0.5, 0.9, 0.999):
        threshold = truncation_threshold(scaled, top_k=top_k, top_p=top_p, min_p=0)
        ours = set((scaled >= threshold).nonzero().view(-1).tolist())
        assert ours == numpy_survivors(scaled.numpy(), top_k, top_p, 0)


def test_equal_tokens_are_one_nucleus() -> None:
    assert truncation_threshold(torch.full((9000,), 2.0), top_k=0, top_p=0.5, min_p=0) == 2


def test_a_flat_distribution_needs_a_large_nucleus() -> None:
    scaled = noise(5000) * 1e-3
    threshold = truncation_threshold(scaled, top_k=0, top_p=0.9, min_p=0)
    assert (scaled >= threshold).sum() == pytest.approx(4500, abs=3)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([4.0, -4.0, 1.0, 2.0])
    seen, output, counts = torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([1, 3])
    penalize_(logits, seen, output, counts, repetition=2.0, presence=0.5, frequency=0.25)
    assert logits.tolist() == [2.0, -8.0 - 0.75, 1.0 - 1.25, 2.0]


def test_a_token_that_is_seen_twice_is_penalized_once() -> None:
    logits, none = torch.tensor([4.0, -4.0]), torch.tensor([], dtype=torch.int64)
    penalize_(logits, torch.tensor([0, 1, 0, 0]), none, none, repetition=2.0, presence=0, frequency=0)
    assert logits.tolist() == [2.0, -8.0]


def test_a_penalty_never_leaves_fp32() -> None:
    logits, none = torch.tensor([4.0, -4.0]), torch.tensor([], dtype=torch.int64)
    penalize_(logits, torch.tensor([0]), none, none, repetition=1e-45, presence=0, frequency=0)
    assert (logits / 1e-5).isfinite().all()
