"""The C kernels of sampling choose exactly what torch's definitions choose."""

import numpy as np
import pytest
import torch

from cabochon.kernels import sampling
from cabochon.kernels.definitions import softcap_
from cabochon.kernels.native.sampling import Slack, find_candidates, find_largest
from cabochon.kernels.sampling import Draw, draw, gumbel, gumbel_argmax, gumbel_argmax_reference, noise_key

DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("build")


def plain(scaled: torch.Tensor, seed: int, position: int) -> int:
    """The definition without any pruning."""
    return int((scaled + gumbel(seed, position, torch.arange(len(scaled)))).argmax())


def rows_of(kind: str, num_rows: int, vocab: int) -> torch.Tensor:
    x = torch.randn((num_rows, vocab), generator=torch.Generator().manual_seed(vocab))
    match kind:
        case "flat":
            return x * 1e-3
        case "wide":
            return x * 5
        case "peaked":
            return x.index_fill(1, torch.tensor([vocab // 2]), 30.0)
        case "tied":
            return (x * 2).round()
        case "masked":
            return x.masked_fill(torch.arange(vocab) % 7 != 3 % vocab, -torch.inf)
        case "top 5":
            return x.masked_fill(x < x.topk(min(5, vocab)).values[:, -1:], -torch.inf)
        case "one":
            return x.masked_fill(torch.arange(vocab) != vocab - 1, -torch.inf)
    raise AssertionError(kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [4, 16, 63, 64, 65, 1000, 5003])
@pytest.mark.parametrize("kind", ["flat", "wide", "peaked", "tied", "masked", "top 5", "one"])
def test_draws_are_the_definitions(kind: str, vocab: int, dtype: torch.dtype) -> None:
    logits = rows_of(kind, 12, vocab).to(dtype)
    rng = np.random.default_rng(vocab)
    seeds = rng.integers(0, 2**64, 36, dtype=np.uint64).tolist()
    temperatures = [1.0, 0.7, 1e-5, 100.0, 0.3, 2.5]
    draws = [Draw(i % 12, temperatures[i % 5], seed, i * i) for i, seed in enumerate(seeds)]
    wanted = [plain(logits[d.row].float() / d.temperature, d.seed, d.position) for d in draws]
    assert draw(logits, draws) == wanted
    scaled = logits[0].float()
    assert gumbel_argmax(scaled, 5, 6) == gumbel_argmax_reference(scaled, 5, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [4, 16, 63, 65, 1000, 5003])
@pytest.mark.parametrize("kind", ["flat", "wide", "peaked", "tied"])
def test_draws_of_capped_logits_are_the_definitions(kind: str, vocab: int, dtype: torch.dtype) -> None:
    logits = (rows_of(kind, 12, vocab) * 5).to(dtype)  # far beyond the cap
    temperatures = [1.0, 0.7, 1e-5, 100.0, 0.3, 2.5]
    draws = [Draw(i % 12, temperatures[i % 6], i * 77, i * i) for i in range(40)]
    capped = softcap_(logits.float().clone(), 30.0)
    wanted = [plain(capped[d.row] / d.temperature, d.seed, d.position) for d in draws]
    assert draw(logits, draws, 30.0) == wanted


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("kind", ["wide", "peaked", "tied"])
def test_draws_of_exact_logits_are_found_by_rounded_ones(kind: str, cap: float | None) -> None:
    exact = rows_of(kind, 12, 1003) * 3
    logits = (
        exact + 0.01 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).sign()
    ).bfloat16()
    draws = [Draw(i % 12, [1.0, 0.7, 0.02, 2.5][i % 4], i * 77, i * i) for i in range(2000)]
    scaled = exact.clone() if cap is None else softcap_(exact.clone(), cap)
    wanted = [plain(scaled[d.row] / d.temperature, d.seed, d.position) for d in draws]
    slack = Slack(torch.full((12,), 0.0101), 1.02 * 2.0**-8)
    found = draw(logits, draws, cap, slack, lambda rows, ids: exact[rows, ids])
    assert found == wanted
    if kind == "wide":
        assert draw(logits, draws, cap) != wanted, "rounding changes some"


@pytest.mark.parametrize("height", [3e8, 3e9])
def test_too_many_candidates_leave_the_draw_to_the_definition(height: float) -> None:
    scaled = torch.full((2000,), height)
    (found,) = find_candidates(scaled[None], [0], [1.0], [noise_key(1, 2)]) or []
    assert found is None
    assert gumbel_argmax(scaled, 1, 2) == plain(scaled, 1, 2)


def test_few_tokens_are_candidates() -> None:
    logits = rows_of("wide", 8, 5003)
    keys = [noise_key(seed, 0) for seed in range(8)]
    found = find_candidates(logits, list(range(8)), [1.0] * 8, keys)
    assert found is not None
    assert all(ids is not None and 0 < len(ids) < 16 for ids in found)


@pytest.mark.parametrize("h", [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1])
def test_the_bounds_hold_at_the_ends_of_the_noise(h: int) -> None:
    """Token 0 has the hash h: mix32(mix32(key_low) ^ key_high), and key_high is free."""
    key_high = unmixed32(h)  # mix32(0) = 0
    seed = (unmixed64(key_high << 32) - sampling.mix64(3)) % 2**64
    assert sampling.hash32(seed, 3, torch.tensor([0])).item() == h
    for gap in (-25.0, -3.0, 0.0, 3.0, 25.0):
        scaled = torch.zeros(40)
        scaled[0] = gap
        assert gumbel_argmax(scaled, seed, 3) == plain(scaled, seed, 3)


def unmixed32(x: int) -> int:
    x ^= x >> 16
    x = x * pow(0xC2B2AE35, -1, 2**32) % 2**32
    x ^= (x >> 13) ^ (x >> 26)
    x = x * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return x ^ (x >> 16)


def unmixed64(x: int) -> int:
    x ^= (x >> 31) ^ (x >> 62)
    x = x * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    x ^= (x >> 27) ^ (x >> 54)
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    x ^= (x >> 30) ^ (x >> 60)
    return (x - 0x9E3779B97F4A7C15) % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 15, 16, 64, 67, 1000])
def test_greedy_is_torchs_max(vocab: int, dtype: torch.dtype) -> None:
    x = torch.cat([rows_of("tied", 6, vocab), rows_of("wide", 6, vocab), torch.full((4, vocab), -torch.inf)])
    x[1, vocab // 2] = torch.nan
    x[2, [0, vocab - 1]] = torch.nan
    x[3, vocab - 1] = torch.inf
    x[4, [vocab // 2, vocab - 1]] = torch.tensor([torch.inf, torch.nan])
    x[5] = torch.tensor([0.0, -0.0]).repeat(vocab)[:vocab]
    logits = torch.cat([x, x], dim=1).to(dtype)[:, :vocab]  # rows with a stride
    found = find_largest(logits)
    assert found is not None
    highest, token_ids = logits.max(-1)
    torch.testing.assert_close(found.highest, highest, rtol=0, atol=0, equal_nan=True)
    assert found.token_ids.tolist() == token_ids.tolist()
    ties = (logits == highest[:, None]).sum(-1)
    assert found.num_tied.tolist() == torch.where(highest.isnan(), 1, ties).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_may_be_less_by_a_slack(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, -8.0, 7.5, 8.0, 7.0], [-8.0, -9.0, -8.5, -8.0, -20.0]] * 40).T.repeat(1, 3)
    logits = logits.T.contiguous().to(dtype)
    for absolute, relative, ties in ((0.0, 0.0, (1, 2)), (0.25, 0.0, (2, 3)), (0.0, 0.03125, (2, 3))):
        found = find_largest(logits, Slack(torch.full((len(logits),), absolute), relative))
        assert found is not None
        assert found.highest.tolist() == [8.0, -8.0] * (len(logits) // 2)
        assert found.token_ids.tolist() == [3, 0] * (len(logits) // 2)
        assert found.num_tied.tolist() == [*ties] * (len(logits) // 2)
