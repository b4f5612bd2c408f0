"""The C layers against torch's definitions and fp64, in every library that this CPU runs."""

from collections.abc import Callable

import pytest
import torch
from guarded import SENTINEL, noise
from torch import Tensor

from cabochon.kernels.definitions import geglu as geglu_reference
from cabochon.kernels.definitions import rms_norm as rms_norm_reference
from cabochon.kernels.definitions import rope_table
from cabochon.kernels.embed_norm import embed_norm_reference
from cabochon.kernels.error_budget import assert_within_budget
from cabochon.kernels.native.layers import embed_norm, geglu, qkv_rope_write, rms_norm, sandwich_norm
from cabochon.kernels.qkv_rope_write import qkv_rope_reference
from cabochon.kernels.sandwich_norm import sandwich_norm_reference

EPS = 1e-6
P = 4
DTYPES = [torch.bfloat16, torch.float32]
pytestmark = [pytest.mark.usefixtures("build"), pytest.mark.parametrize("dtype", DTYPES, ids=str)]


def unwritten(*shape: int, dtype: torch.dtype, pad: int = 64) -> Tensor:
    """NaN, in the middle of other memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * pad,), SENTINEL, dtype=dtype)
    memory[pad : pad + size] = torch.nan
    return memory[pad : pad + size].view(shape)


def surroundings_are_untouched(x: Tensor, pad: int = 64) -> bool:
    ends = (x.storage_offset() - pad, x.storage_offset() + x.numel())
    return all(bool((x.as_strided((pad,), (1,), end) == SENTINEL).all()) for end in ends)


def weights(size: int, *seeds: int) -> list[Tensor]:
    return [1 + noise(size, seed=seed) for seed in seeds]


@pytest.mark.parametrize("T", [0, 1, 7, 130])
@pytest.mark.parametrize("E", [16, 48, 640, 2304])
def test_rms_norm_is_the_definition(T: int, E: int, dtype: torch.dtype) -> None:
    x, (weight,), out = noise(T, E).to(dtype), weights(E, 1), unwritten(T, E, dtype=dtype)
    rms_norm(x, weight, EPS, out=out)
    if T:
        low, truth = rms_norm_reference(x, weight, EPS), rms_norm_reference(x.double(), weight.double(), EPS)
        assert_within_budget(out, low, truth)
    assert surroundings_are_untouched(out)


@pytest.mark.parametrize("T", [1, 7, 130])
def test_embed_norm_is_the_definition(T: int, dtype: torch.dtype) -> None:
    embedding, (weight,) = noise(50, 640).to(dtype), weights(640, 1)
    token_ids, scale = torch.arange(T) * 7 % 50, torch.tensor(640**0.5, dtype=dtype).item()
    residual, x = (unwritten(T, 640, dtype=dtype) for _ in range(2))
    embed_norm(token_ids, embedding, scale, weight, EPS, residual_out=residual, x_out=x)
    low = embed_norm_reference(token_ids, embedding, scale, weight, EPS)
    truth = rms_norm_reference(low[0].double(), weight.double(), EPS)
    assert torch.equal(residual, low[0])
    assert_within_budget(x, low[1], truth)
    assert surroundings_are_untouched(residual)
    assert surroundings_are_untouched(x)


@pytest.mark.parametrize("T", [0, 1, 7, 130])
@pytest.mark.parametrize("E", [16, 640])
def test_sandwich_norm_is_the_definition(T: int, E: int, dtype: torch.dtype) -> None:
    branch, before, (post, pre) = noise(T, E).to(dtype), noise(T, E, seed=1).to(dtype), weights(E, 2, 3)
    residual, x = unwritten(T, E, dtype=dtype).copy_(before), unwritten(T, E, dtype=dtype)
    sandwich_norm(branch, residual, post, pre, EPS, residual_out=residual, x_out=x)
    if T:
        low = sandwich_norm_reference(branch, before, post, pre, EPS)
        truth = sandwich_norm_reference(branch.double(), before.double(), post.double(), pre.double(), EPS)
        assert_within_budget(residual, low[0], truth[0])
        assert_within_budget(x, low[1], truth[1])
        assert (residual != low[0]).float().mean() < (
            1e-3 if dtype == torch.bfloat16 else 1
        )  # same roundings
    assert surroundings_are_untouched(residual)
    assert surroundings_are_untouched(x)


def test_after_the_last_layer_only_the_residual_is_written(dtype: torch.dtype) -> None:
    branch, before, (post,) = noise(3, 64).to(dtype), noise(3, 64, seed=1).to(dtype), weights(64, 2)
    residual = before.clone()
    sandwich_norm(branch, residual, post, None, EPS, residual_out=residual, x_out=None)
    expected = before.clone()
    sandwich_norm(branch, expected, post, post, EPS, residual_out=expected, x_out=torch.empty_like(branch))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("T", [0, 1, 7, 130])
@pytest.mark.parametrize("F", [16, 2048])
def test_geglu_is_the_definition(T: int, F: int, dtype: torch.dtype) -> None:
    gate_up, out = noise(T, 2 * F).to(dtype), unwritten(T, F, dtype=dtype)
    geglu(gate_up, out=out)
    if T:
        assert_within_budget(out, geglu_reference(gate_up), geglu_reference(gate_up.double()))
    assert surroundings_are_untouched(out)


def test_geglu_at_the_ends_of_the_range_is_torchs(dtype: torch.dtype) -> None:
    ends = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        5.0,
        -5.0,
        12.0,
        -12.0,
        1e4,
        -1e4,
        1e18,
        -1e18,
        torch.inf,
        torch.nan,
        1,
        2,
    ]
    gate_up, out = torch.tensor([[*ends, *[1.0] * 16]], dtype=dtype), torch.empty(1, 16, dtype=dtype)
    geglu(gate_up, out=out)
    expected = torch.nn.functional.gelu(gate_up[:, :16].double(), approximate="tanh").to(dtype)
    torch.testing.assert_close(out, expected, equal_nan=True, atol=2e-6, rtol=torch.finfo(dtype).eps * 2)


class Heads:
    """T tokens of one step: positions, slots in random order."""

    def __init__(self, T: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype) -> None:
        self.heads = (Hq, Hkv)
        self.qkv = noise(T, (Hq + 2 * Hkv) * D).to(dtype)
        self.positions = torch.arange(T) * 7 % 50
        self.tables = rope_table(50, D, 10_000.0)
        num_slots = (2 * T // P + 2) * P
        self.slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1))[:T]
        self.pages = [unwritten(num_slots // P, P, Hkv, D, dtype=dtype).fill_(SENTINEL) for _ in range(2)]
        self.q_out = unwritten(T, Hq, D, dtype=dtype)

    def run(self, **norms: Tensor) -> None:
        qkv_rope_write(
            self.qkv, self.positions, *self.tables, self.slots,
            q_out=self.q_out, k_pages=self.pages[0], v_pages=self.pages[1], eps=EPS, **norms,
        )  # fmt: skip

    def reference(self, dtype: torch.dtype, **norms: Tensor) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        tables, norms = [x.to(wide) for x in self.tables], {name: x.to(wide) for name, x in norms.items()}
        return qkv_rope_reference(
            self.qkv.to(dtype), self.positions, *tables, self.heads, eps=EPS, **norms
        )  # fmt: skip


@pytest.mark.parametrize("T", [0, 1, 7, 70])
@pytest.mark.parametrize(("Hq", "Hkv", "D"), [(4, 1, 256), (4, 2, 16), (2, 2, 48), (1, 1, 512)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_queries_and_pages_are_the_definition(
    T: int, Hq: int, Hkv: int, D: int, has_norm: bool, dtype: torch.dtype
) -> None:
    case = Heads(T, Hq, Hkv, D, dtype)
    norms = dict(zip(("q_norm", "k_norm"), weights(D, 2, 3), strict=True)) if has_norm else {}
    case.slots[::3] = -1  # padding
    case.run(**norms)
    is_token = case.slots >= 0
    if T:
        low, truth = case.reference(dtype, **norms), case.reference(torch.float64, **norms)
        assert_within_budget(case.q_out, low[0], truth[0])
    if is_token.any():
        k, v = (pages.flatten(0, 1)[case.slots[is_token]] for pages in case.pages)
        assert_within_budget(k, low[1][is_token], truth[1][is_token])
        assert torch.equal(v, low[2][is_token])
    free = torch.ones(case.pages[0].shape[0] * P, dtype=torch.bool)
    free[case.slots[is_token]] = False
    assert all((pages.flatten(0, 1)[free] == SENTINEL).all() for pages in case.pages)
    assert all(surroundings_are_untouched(x) for x in (case.q_out, *case.pages))


def rows_of(name: str, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows, and what a kernel makes of such rows."""
    (weight,) = weights(640, 3)

    def norm(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        rms_norm(x, weight, EPS, out=out)
        return out

    def sandwich(x: Tensor) -> Tensor:
        residual, out = x.flip(1).contiguous(), torch.empty_like(x)
        sandwich_norm(x, residual, weight, weight, EPS, residual_out=residual, x_out=out)
        return torch.cat([residual, out], dim=1)

    def gated(x: Tensor) -> Tensor:
        out = torch.empty(len(x), 320, dtype=x.dtype)
        geglu(x, out=out)
        return out

    return noise(300, 640).to(dtype), {"norm": norm, "sandwich": sandwich, "geglu": gated}[name]


@pytest.mark.parametrize("name", ["norm", "sandwich", "geglu"])
def test_a_row_is_bitwise_the_same_in_any_batch_and_by_any_thread(name: str, dtype: torch.dtype) -> None:
    rows, run = rows_of(name, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = run(rows)
        torch.set_num_threads(1)
        assert torch.equal(run(rows), whole)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 7, 8, 150, 299):
        assert torch.equal(run(rows[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("name", ["norm", "sandwich", "geglu"])
def test_nan_stays_in_its_row(name: str, dtype: torch.dtype) -> None:
    rows, run = rows_of(name, dtype)
    clean = run(rows)
    rows[3, 100] = torch.nan
    spoilt = run(rows)
    assert spoilt[3].isnan().any()
    assert torch.equal(spoilt[[*range(3), *range(4, 300)]], clean[[*range(3), *range(4, 300)]])


def test_what_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(2, 32, dtype=dtype), torch.ones(32)
    odd = torch.zeros(2, 24, dtype=dtype)
    for arguments in ((odd, torch.ones(24), odd), (x.T, torch.ones(2), x.T), (x.half(), weight, x.half())):
        with pytest.raises(ValueError, match="must"):
            rms_norm(arguments[0], arguments[1], EPS, out=arguments[2])
    for wrong in (torch.ones(31), torch.ones(32, dtype=torch.float64), torch.ones(64)[::2]):
        with pytest.raises(ValueError, match=r"must be a contiguous \[32\] fp32"):
            rms_norm(x, wrong, EPS, out=x)
    with pytest.raises(ValueError, match="must fit"):
        geglu(x, out=torch.zeros(2, 32, dtype=dtype))
    with pytest.raises(ValueError, match="must fit"):
        sandwich_norm(x, x, weight, None, EPS, residual_out=x, x_out=torch.zeros_like(x))
    ids = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="must fit"):
        embed_norm(ids, x, 1.0, weight, EPS, residual_out=x, x_out=torch.zeros_like(x))
