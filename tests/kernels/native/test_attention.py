"""Attention in C against the definition in fp64, in every library that this CPU runs.

The engine's cases, with pages that come and go, are in tests/engine/test_attention_backends.py.
"""

import pytest
import torch
from guarded import SENTINEL
from torch import Tensor

from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.native.attention import native_attention
from cabochon.kernels.paged_attention import paged_attention_reference

P = 4
SCALE = 0.25
pytestmark = pytest.mark.usefixtures("build")


class Case:
    """Sequences of (tokens before the step, tokens in it), keys and values in pages of random order."""

    def __init__(
        self, contexts: list[tuple[int, int]], *, heads: tuple[int, int] = (4, 2), D: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(0)
        seq_lens = [before + new for before, new in contexts]
        width = -(-max(seq_lens) // P)
        num_pages = len(contexts) * width + 3
        tables = torch.randperm(num_pages - 1, generator=g)[: len(contexts) * width] + 1
        self.table = tables.view(len(contexts), width).to(torch.int32)
        self.cu_seqlens = torch.tensor([0, *(new for _, new in contexts)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        )
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        shape = (num_pages, P, heads[1], D)
        self.k, self.v = (torch.randn(shape, generator=g).mul_(2).to(dtype) for _ in range(2))
        self.q = torch.randn((int(self.cu_seqlens[-1]), heads[0], D), generator=g).mul_(2).to(dtype)
        self.k[0] = self.v[0] = 0

    def indices(self, *sequences: int) -> tuple[Tensor, Tensor, Tensor]:
        """As if these sequences were all of the step, each with one token: its last."""
        chosen = list(sequences)
        ends = torch.arange(len(chosen) + 1, dtype=torch.int32)
        return self.table[chosen].contiguous(), ends, self.seq_lens[chosen].contiguous()

    def run(
        self, q: Tensor | None = None, indices: tuple[Tensor, Tensor, Tensor] | None = None, **how: object
    ) -> Tensor:
        q = self.q if q is None else q
        out = torch.full_like(q, SENTINEL)
        given = indices or (self.table, self.cu_seqlens, self.seq_lens)
        native_attention(
            q, self.k, self.v, *given, scale=SCALE, **{"softcap": None, "window": None} | how, out=out
        )
        return out

    def reference(self, dtype: torch.dtype, **how: object) -> Tensor:
        tensors = (x.to(dtype) for x in (self.q, self.k, self.v))
        indices = self.table, self.cu_seqlens, self.seq_lens
        return paged_attention_reference(
            *tensors, *indices, scale=SCALE, **{"softcap": None, "window": None} | how
        )


CONTEXTS = [(9, 1), (0, 1), (21, 1), (0, 13), (5, 7), (15, 2), (0, 40)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "D"), [((4, 4), 16), ((4, 2), 48), ((6, 2), 64), ((20, 1), 32), ((2, 1), 256)]
)
@pytest.mark.parametrize("softcap", [None, 1.0, 50.0])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
def test_equals_the_definition(
    heads: tuple[int, int], D: int, softcap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    case = Case(CONTEXTS, heads=heads, D=D, dtype=dtype)
    how = {"softcap": softcap, "window": window}
    factor = 16.0 if dtype == torch.float32 else 2.0  # torch's sums of so few terms come out almost exact
    assert_within_budget(
        case.run(**how), case.reference(dtype, **how), case.reference(torch.float64, **how), factor
    )


@pytest.mark.parametrize("window", [None, 512, 4096])
def test_equals_the_definition_over_thousands_of_keys(window: int | None) -> None:
    case = Case([(4095, 1), (4096, 1), (4090, 10), (8000, 3)], heads=(2, 1))
    how = {"softcap": 50.0, "window": window}
    assert_within_budget(
        case.run(**how), case.reference(torch.float32, **how), case.reference(torch.float64, **how), 4.0
    )


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads", [(4, 1), (3, 3)])
def test_a_token_is_bitwise_the_same_alone_in_a_chunk_and_by_any_thread(
    window: int | None, heads: tuple[int, int]
) -> None:
    case = Case([(0, 70), (33, 30)], heads=heads, D=64)
    how = {"softcap": 50.0, "window": window}
    whole = case.run(**how)
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 3):
            torch.set_num_threads(torch_threads)
            assert torch.equal(case.run(**how), whole)
    finally:
        torch.set_num_threads(threads)
    for sequence, token in ((0, 69), (1, 99)):
        alone = case.run(case.q[token : token + 1], case.indices(sequence), **how)
        assert torch.equal(alone[0], whole[token])
    chunk = (case.table[:1], torch.tensor([0, 20], dtype=torch.int32), case.seq_lens[:1])
    assert torch.equal(case.run(case.q[50:70], chunk, **how), whole[50:70])


def test_what_no_sequence_has_is_left_as_it_is() -> None:
    case = Case([(3, 2)])
    q = torch.cat([case.q, torch.full_like(case.q, torch.nan)])
    out = case.run(q)
    assert torch.isfinite(out[:2]).all()
    assert (out[2:] == SENTINEL).all()


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_keys_that_are_not_visible_are_never_read(softcap: float | None) -> None:
    case = Case([(9, 2)])
    clean = case.run(softcap=softcap, window=4)
    behind, beyond = case.table[0, 0], case.table[0, 2]  # keys 0..3, of which no window reaches any; key 11
    for pages in (case.k, case.v):
        pages[behind] = torch.nan
        pages[beyond, 3] = torch.nan
    assert torch.equal(case.run(softcap=softcap, window=4), clean)


def test_nan_shows() -> None:
    case = Case([(9, 2), (5, 1)])
    case.k[case.table[0, 0], 1] = torch.nan
    out = case.run()
    assert out[:2].isnan().all()
    assert torch.isfinite(out[2]).all()


def test_scores_of_any_size_have_a_softmax() -> None:
    case = Case([(30, 1)], heads=(1, 1))
    case.q *= 1e4
    assert_within_budget(case.run(), case.reference(torch.float32), case.reference(torch.float64), 4.0)


def test_what_does_not_fit_is_refused() -> None:
    case = Case([(3, 2)])
    with pytest.raises(ValueError, match="shapes and dtypes must fit"):
        case.run(case.q[:, :3].contiguous())
    with pytest.raises(ValueError, match="of one dtype"):
        case.run(case.q.bfloat16())
    with pytest.raises(ValueError, match="indices must be contiguous int32"):
        case.run(indices=(case.table.long(), case.cu_seqlens, case.seq_lens))
    with pytest.raises(ValueError, match="indices must be contiguous int32"):
        case.run(indices=(case.table, case.cu_seqlens[:1], case.seq_lens))
