"""The attention benchmarks without a GPU: what they count, that they check what they time, what is absent."""

import warnings
from types import ModuleType

import attention_peers
import attention_problem
import bench_decode_attention as decode
import bench_prefill_attention as prefill
import pytest
import torch
from attention_problem import Heads, Problem, check, contiguous_kv, flops, kv_bytes, visible_pairs
from gpu_rates import Rates

SMALL = Heads(num_heads=2, num_kv_heads=1, head_dim=16, scale=0.25, softcap=50.0, window=20)


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (9, 9), (4, 9), (9, 20)])
def test_visible_pairs_are_those_of_the_mask(queries: int, keys: int, window: int | None) -> None:
    pairs = [
        (q, k)
        for q in range(keys - queries, keys)
        for k in range(keys)
        if k <= q and (window is None or k > q - window)
    ]
    assert visible_pairs(queries, keys, window) == len(pairs)


def test_work_and_traffic_by_hand() -> None:
    assert flops(SMALL, 3, 10) == 3 * 10 * 2 * (2 * 16 + 2 * 16)
    assert kv_bytes(SMALL, 3, 50, None, itemsize=2) == 3 * 50 * 2 * 16 * 2
    assert kv_bytes(SMALL, 3, 50, 20, itemsize=1) == 3 * 20 * 2 * (16 + 4)


def test_sliding_layers_are_timed_where_the_window_hides_something() -> None:
    assert [tuple(shape) for shape in decode.shapes(SMALL, [(1, 20), (4, 21)])] == [
        (1, 20, False),
        (4, 21, False),
        (4, 21, True),
    ]
    assert [tuple(shape) for shape in prefill.shapes(SMALL, [(2, 5, 64)])] == [
        (2, 5, 64, False),
        (2, 5, 64, True),
    ]


def problem(queries: int, *, is_fp8: bool = False) -> Problem:
    torch.manual_seed(0)
    return attention_problem.make_problem(SMALL, 3, queries, 40, 20, is_fp8, device="cpu")


@pytest.mark.parametrize("is_fp8", [False, True])
def test_what_is_timed_is_right(is_fp8: bool) -> None:
    one, many = problem(1, is_fp8=is_fp8), problem(12, is_fp8=is_fp8)
    check(decode.ours(one)(), one)
    check(prefill.ours(many)(), many)


def test_a_fast_wrong_kernel_gets_no_row() -> None:
    one = problem(1)
    with pytest.raises(AssertionError, match="over budget"):
        check(decode.ours(one)() * 1.1, one)


def test_baselines_get_the_keys_in_order() -> None:
    one = problem(1)
    k, v = contiguous_kv(one)
    assert k.shape == v.shape == (3, 40, 1, 16)
    page, offset = one.page_table[2, 33 // 16], 33 % 16
    assert torch.equal(k[2, 33], one.k_pages[page, offset])


@pytest.mark.parametrize("window", [None, 20])
def test_flex_attention_is_given_the_same_problem(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager: what is compiled on a GPU is the same operator."""
    module = attention_problem.optional("torch.nn.attention.flex_attention")
    assert module is not None
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention_peers, "_flex", lambda: module.flex_attention)
    for peer, queries in ((attention_peers.flex_decode, 1), (attention_peers.flex_prefill, 12)):
        one = attention_problem.make_problem(SMALL, 3, queries, 40, window, False, device="cpu")
        call = peer(one)
        assert call is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            check(call(), one)


@pytest.mark.parametrize(
    ("bench", "name"), [(decode, "flashinfer"), (prefill, "flashinfer"), (prefill, "fa3")]
)
def test_a_baseline_is_absent_or_failed_and_ends_nothing(
    bench: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(copy_gb_per_s=1, product_tflop_per_s=1)
    assert bench.baseline(name, problem(1), rates, 1) == {"absent": True}

    def broken(*_: object) -> None:
        raise RuntimeError("built for another torch")

    monkeypatch.setattr(bench, "flash", broken)
    monkeypatch.setitem(bench.PEERS, "flashinfer", broken)
    row = bench.baseline(name, problem(1), rates, 1)
    assert row == {"error": "RuntimeError", "message": "built for another torch"}


@pytest.mark.parametrize("bench", [decode, prefill])
def test_shapes_are_numbers_with_an_x_between(bench: ModuleType) -> None:
    assert bench.sizes("32x8192") == (32, 8192)


@pytest.mark.parametrize("bench", [decode, prefill])
def test_a_baseline_that_is_not_installed_is_absent(bench: ModuleType) -> None:
    assert bench.flash("no_such_module_of_ours", problem(1)) is None


@pytest.mark.parametrize("bench", [decode, prefill])
def test_every_configuration_of_the_sweep_is_another(bench: ModuleType) -> None:
    configs = list(bench.sweep())
    assert len(set(configs)) == len(configs) > 50
