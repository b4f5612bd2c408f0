"""The likeliest token by a screen in 8 bits: in every library the one that all exact products show."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.engine.int8_linear import error_bounds
from cabochon.kernels.definitions import softcap_
from cabochon.kernels.native.quantize import pack, quantize_weight
from cabochon.kernels.native.screen import CAPACITY, MAX_COLUMNS, TOKENS, can_screen, entries, screen
from cabochon.kernels.sampling import Draw, gumbel_argmax_reference, noise_key, winner

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("build")


def random(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


class Head:
    """An embedding and its screen."""

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding
        N, K = embedding.shape
        values, scales = quantize_weight(embedding)
        errors, largest = error_bounds(embedding, values, scales)
        past = -N % TOKENS
        padded = torch.nn.functional.pad(errors, (0, past), value=torch.nan)
        self._weight = pack(values, K, N + past), torch.nn.functional.pad(scales, (0, past)), padded, largest

    def largest(self, x: Tensor) -> list[int]:
        found = screen(x, *self._weight, self.embedding)
        assert ((found.num_tokens == 1) | (found.num_tokens == -1)).all()
        return torch.where(found.num_tokens == 1, found.token_ids[:, 0], -1).tolist()

    def drawn(self, x: Tensor, draws: list[Draw], cap: float | None) -> list[int]:
        """The winners among what is left of each row, as long as there is something."""
        keys = [(draw.temperature, noise_key(draw.seed, draw.position)) for draw in draws]
        found = screen(x, *self._weight, self.embedding, keys, cap)
        chosen = []
        for draw, token_ids, logits, count in zip(draws, *found, strict=True):
            ids, order = token_ids[: int(count)].long().sort()
            chosen.append(-1 if count < 1 else winner(draw, ids, logits[: int(count)][order], cap))
        return chosen


def screened(x: Tensor, embedding: Tensor) -> list[int]:
    return Head(embedding).largest(x)


def products(x: Tensor, embedding: Tensor) -> Tensor:
    """[T, N] fp32: the sums that the screen compares, of every token."""
    N = len(embedding)
    return entries(x.repeat_interleave(N, dim=0), embedding.repeat(len(x), 1)).view(-1, N)


def likeliest(x: Tensor, embedding: Tensor) -> list[int]:
    return [int((row == row.max()).nonzero()[0, 0]) for row in products(x, embedding)]


def draw_of_all(x: Tensor, embedding: Tensor, draws: list[Draw], cap: float | None) -> list[int]:
    """By the definition."""
    rows = products(x, embedding)
    scaled = [
        (row if cap is None else softcap_(row, cap)) / d.temperature
        for row, d in zip(rows, draws, strict=True)
    ]
    return [gumbel_argmax_reference(row, d.seed, d.position) for row, d in zip(scaled, draws, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 35])
@pytest.mark.parametrize(("N", "K"), [(1, 16), (63, 32), (64, 48), (1031, 640)])
def test_the_winner_is_that_of_all_products(T: int, N: int, K: int, dtype: torch.dtype) -> None:
    embedding, x = random(N, K, dtype), random(T, K, dtype, seed=1)
    assert screened(x, embedding) == likeliest(x, embedding)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 50, 1031]),
    columns=st.sampled_from([16, 64, 336]),
    sizes=st.sampled_from([0.0, 0.5, 2.0]),
    standing_out=st.sampled_from([0, 1, 4, 5, 16]),
    near=st.sampled_from([None, 1e-1, 1e-2, 1e-4]),
    dtype=st.sampled_from(DTYPES),
)
def test_no_winner_is_missed(
    seed: int,
    vocab: int,
    columns: int,
    sizes: float,
    standing_out: int,
    near: float | None,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns_of_x = torch.exp(sizes * torch.randn(columns, generator=generator))
    x = torch.randn((6, columns), generator=generator) * columns_of_x
    x[:, :standing_out] *= 10.0 ** torch.randint(0, 5, (6, 1), generator=generator)
    embedding = torch.randn((vocab, columns), generator=generator)
    embedding *= torch.exp(sizes * torch.randn((vocab, 1), generator=generator))
    if near is not None:  # all of them nearly the same
        embedding = embedding[:1] + near * embedding
    x, embedding = x.to(dtype), embedding.to(dtype)
    assert screened(x, embedding) == likeliest(x, embedding)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 50, 1031]),
    sizes=st.sampled_from([0.0, 0.1, 1.0]),
    temperature=st.sampled_from([1e-4, 0.3, 1.0, 2.0]),
    cap=st.sampled_from([None, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_no_winner_of_a_draw_is_missed(
    seed: int, vocab: int, sizes: float, temperature: float, cap: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((6, 64), generator=generator).to(dtype)
    embedding = (torch.randn((vocab, 64), generator=generator) * sizes).to(dtype)
    draws = [Draw(row, temperature * (1 + row % 2), seed + row, 100 + row) for row in range(6)]
    found, expected = Head(embedding).drawn(x, draws, cap), draw_of_all(x, embedding, draws, cap)
    for mine, right in zip(found, expected, strict=True):
        assert mine in (right, -1)
    if vocab == 1031 and temperature in (0.3, 1.0) and sizes == 1.0:
        assert found == expected, "none had too many"


def test_rows_that_draw_do_not_change_the_others() -> None:
    head, x = Head(random(500, 64)), random(20, 64, seed=1)
    draws = [Draw(row, 0.8, row, 5) if row % 3 else None for row in range(20)]
    keys = [None if d is None else (d.temperature, noise_key(d.seed, d.position)) for d in draws]
    found = screen(x, *head._weight, head.embedding, keys)
    expected = likeliest(x, head.embedding)
    for row, draw in enumerate(draws):
        if draw is None:
            assert found.token_ids[row, 0] == expected[row]
        else:
            assert (
                head.drawn(x[row : row + 1], [draw], None)[0] in found.token_ids[row, : found.num_tokens[row]]
            )


def test_of_equal_tokens_the_first_wins() -> None:
    embedding, x = random(300, 64), random(20, 64, seed=1)
    for row, best in enumerate(likeliest(x, embedding)):
        embedding[[7 + row, 290 - row]] = embedding[best].clone()
    found = screened(x, embedding)
    assert found == likeliest(x, embedding)
    exact = x.double() @ embedding.double().T
    assert all((exact[row] == exact[row, best]).sum() >= 2 for row, best in enumerate(found))


def test_rows_that_cannot_be_told_are_named_and_no_others() -> None:
    embedding, x = random(CAPACITY + 100, 16), random(24, 16, seed=1)
    expected = likeliest(x, embedding)
    x[1] = 0
    x[3, 5], x[17, 0], x[23, 15] = torch.nan, torch.inf, -torch.inf
    x[5] *= 1e-24
    x[7] *= 1e20
    for row in (1, 3, 5, 7, 17, 23):
        expected[row] = -1
    assert screened(x, embedding) == expected, "of a row of zeros there are too many candidates"
    assert screened(x[:2], embedding[:1].repeat(CAPACITY, 1)) == [0, 0]


@pytest.mark.parametrize("rest", [0, 1, 127])
@pytest.mark.parametrize("num_large", [3, 10, 40])
def test_bounds_hold_where_rounding_has_changed_the_most(num_large: int, rest: int) -> None:
    """A winner whose elements were rounded against x, beside a loser's that were rounded with it."""
    generator = torch.Generator().manual_seed(num_large)
    x = torch.full((1, 64), float(rest))
    x[0, 1 : 1 + num_large] = 127
    x *= torch.randint(0, 2, (1, 64), generator=generator) * 2 - 1
    x[0, 0], x[0, 63] = 0, max(rest, 1)
    signs = x[0].sign()
    whole = torch.randint(1, 100, (64,), generator=generator) * signs
    winner_row, loser = whole + 0.49 * signs, whole + 0.51 * signs
    loser[63] -= 1 + 0.02 * float(x.abs().sum()) // float(x[0, 63])  # a little below the winner
    embedding = torch.stack([-winner_row, loser, winner_row, whole / 2])
    embedding[:, 0] = 127  # the scale is 1
    rounded = x @ embedding.round().T
    assert rounded[0, 1] > rounded[0, 2], "by the rounded weights alone the loser would win"
    assert likeliest(x, embedding) == [2]
    assert screened(x, embedding) == [2]


def test_a_row_has_its_token_in_every_batch_and_by_any_thread() -> None:
    embedding, x = random(5000, 96), random(40, 96, seed=1)
    head = Head(embedding)
    x *= (10.0 ** torch.arange(-10, 10, 0.5)).to(x.dtype)[:, None]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = head.largest(x)
        torch.set_num_threads(1)
        assert head.largest(x) == whole
    finally:
        torch.set_num_threads(threads)
    for rows in (1, 2, 3, 7, 16):
        for start in (0, 9, 40 - rows):
            assert head.largest(x[start : start + rows]) == whole[start : start + rows]


def test_sums_of_the_largest_values_do_not_overflow() -> None:
    embedding, x = torch.ones(70, MAX_COLUMNS), torch.ones(3, MAX_COLUMNS)
    embedding[50] = 1.5
    x[1] = -1
    x[2, :4] = 1e6
    embedding[1] = 0.5
    assert screened(x, embedding) == [50, 1, 50]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_are_exact_and_each_by_itself(dtype: torch.dtype) -> None:
    x, weight = random(131, 640, dtype), random(131, 640, dtype, seed=1)
    found = entries(x, weight)
    truth = (x.double() * weight.double()).sum(-1)
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=0)
    assert torch.equal(entries(x[7:8], weight[7:8]), found[7:8])


def test_only_vnni_makes_it_worth_while(build: str) -> None:
    assert can_screen() == (build == "_v4_vnni")


def test_what_does_not_fit_is_refused() -> None:
    packed, vector = torch.zeros((64, 32), dtype=torch.uint8), torch.zeros(64)
    x, embedding = random(2, 32), random(64, 32)[:50]
    found = screen(x, packed, vector, vector, 1.0, embedding)
    assert (found.token_ids[:, 0] < 50).all(), "no token past the last one"
    for wrong in (
        (x[:, :16].contiguous(), packed, vector, vector, 1.0, embedding),
        (x, packed.view(torch.int8), vector, vector, 1.0, embedding),
        (x, packed, vector[:50], vector, 1.0, embedding),
        (x, packed, vector, vector.double(), 1.0, embedding),
        (x, packed, vector, vector, 1.0, random(65, 32)),
        (x.float(), packed, vector, vector, 1.0, embedding),
    ):
        with pytest.raises(ValueError, match="must"):
            screen(*wrong)
    with pytest.raises(ValueError, match="must"):
        entries(x, embedding)
