"""Paged attention against a dense fp64 softmax with a mask built key by key."""

import numpy as np
import pytest
import torch

from cabochon.kernels.paged_attention import KEY_TILE, paged_attention, plan_sections

P = 4  # tokens per page


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    scale: float,
    cap: float | None,
    window: int | None,
) -> torch.Tensor:
    """q: [n, Hq, D] at positions start..; k, v: [start + n, Hkv, D]. fp64, one query and head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        for h in range(q.shape[1]):
            scores = (k[:, h // group].double() @ q[i, h].double()) * scale
            scores = cap * torch.tanh(scores / cap) if cap else scores
            for key in range(len(k)):
                if not (key <= start + i and (window is None or key > start + i - window)):
                    scores[key] = -torch.inf
            out[i, h] = scores.softmax(0) @ v[:, h // group].double()
    return out


class Case:
    """Sequences with random K and V in NaN-surrounded pages."""

    def __init__(
        self,
        contexts: list[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.starts = np.array([start for start, _ in contexts], np.int32)
        self.lens = np.array([n for _, n in contexts], np.int32)
        ends = self.starts + self.lens
        width = -(-int(ends.max(initial=1)) // P)
        self.q = torch.randn((int(self.lens.sum()), heads, dim), generator=g) * 4
        self.k = [torch.randn((int(end), kv_heads, dim), generator=g) * 4 for end in ends]
        self.v = [torch.randn((int(end), kv_heads, dim), generator=g) for end in ends]
        num_pages = len(contexts) * width + 3
        self.table = np.zeros((len(contexts), width), np.int32)
        self.k_pages = torch.full((num_pages + 1, P, kv_heads, dim), torch.nan)
        self.v_pages = self.k_pages.clone()
        self.k_pages[0] = self.v_pages[0] = 0
        free = list(rng.permutation(num_pages) + 1)
        for seq, end in enumerate(ends):
            for position in range(int(end)):
                page_idx, offset = divmod(position, P)
                if offset == 0:
                    self.table[seq, page_idx] = free.pop()
                page = int(self.table[seq, page_idx])
                self.k_pages[page, offset] = self.k[seq][position]
                self.v_pages[page, offset] = self.v[seq][position]

    def run(self, *, cap: float | None, window: int | None, num_decodes: int = 0) -> torch.Tensor:
        sections = plan_sections(
            self.starts, self.lens, num_decodes, self.table,
            page_tokens=P, num_kv_heads=self.k_pages.shape[2], head_dim=self.k_pages.shape[3],
            window=window,
        )  # fmt: skip
        return paged_attention(self.q, self.k_pages, self.v_pages, sections, scale=0.25, softcap=cap)

    def truth(self, *, cap: float | None, window: int | None) -> torch.Tensor:
        parts, token = [], 0
        for seq, (start, n) in enumerate(zip(self.starts, self.lens, strict=True)):
            q = self.q[token : token + n]
            parts.append(dense(q, self.k[seq], self.v[seq], int(start), 0.25, cap, window))
            token += n
        return torch.cat(parts)


@pytest.mark.parametrize("cap", [None, 5.0, 50.0])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 16, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_equals_the_dense_definition(
    cap: float | None, window: int | None, heads: int, kv_heads: int
) -> None:
    case = Case([(9, 1), (0, 1), (21, 1), (0, 13), (5, 7), (15, 2)], heads=heads, kv_heads=kv_heads)
    out = case.run(cap=cap, window=window, num_decodes=3)
    torch.testing.assert_close(out.double(), case.truth(cap=cap, window=window), atol=2e-5, rtol=0)


@pytest.mark.parametrize("window", [None, KEY_TILE - 1, KEY_TILE, KEY_TILE + 1])
def test_equals_the_dense_definition_across_tiles(window: int | None) -> None:
    case = Case(
        [(2 * KEY_TILE + 5, 1), (KEY_TILE - 1, 1), (KEY_TILE, 1), (KEY_TILE - 3, 6)], heads=2, kv_heads=1
    )
    out = case.run(cap=50.0, window=window, num_decodes=3)
    torch.testing.assert_close(out.double(), case.truth(cap=50.0, window=window), atol=2e-5, rtol=0)


def test_gemma2s_window_is_4096_keys_and_the_query_is_one_of_them() -> None:
    case = Case([(4094, 1), (4095, 1), (4096, 1), (4097, 1), (4090, 10)], heads=2, kv_heads=1)
    case.q.zero_()  # all visible keys weigh the same, so one more or less shows
    case.v = [v + 1 for v in case.v]
    case.v_pages[1:] += 1
    out = case.run(cap=50.0, window=4096, num_decodes=4)
    torch.testing.assert_close(out.double(), case.truth(cap=50.0, window=4096), atol=2e-5, rtol=0)
    for window in (4095, 4097):
        wrong = case.run(cap=50.0, window=window, num_decodes=4)
        assert (wrong[3] - out[3]).abs().max() > 1e-4


@pytest.mark.parametrize("cap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 3, 300])
def test_a_decode_is_bitwise_the_last_row_of_a_prefill(cap: float | None, window: int | None) -> None:
    whole = Case([(0, 2 * KEY_TILE + 7)])
    expected = whole.run(cap=cap, window=window)
    for position in (0, 1, 130, KEY_TILE - 1, KEY_TILE, 2 * KEY_TILE + 6):
        whole.q, q = whole.q[position : position + 1], whole.q
        whole.starts, whole.lens = np.array([position], np.int32), np.array([1], np.int32)
        assert torch.equal(whole.run(cap=cap, window=window, num_decodes=1)[0], expected[position])
        assert torch.equal(whole.run(cap=cap, window=window, num_decodes=0)[0], expected[position])
        whole.q = q


def test_an_empty_step_gives_an_empty_result() -> None:
    case = Case([(0, 1)])
    case.q, case.starts, case.lens = case.q[:0], case.starts[:0], case.lens[:0]
    case.table = case.table[:0]
    assert case.run(cap=None, window=None).shape == (0, 4, 16)


def test_scores_of_infinite_size_stay_finite_under_the_cap() -> None:
    case = Case([(0, 9)])
    case.q *= 1e6
    assert torch.isfinite(case.run(cap=50.0, window=4)).all()
