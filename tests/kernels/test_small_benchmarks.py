"""The small kernels' benchmarks without a GPU: each case runs, passes its own check, and notices a fault."""

from collections.abc import Callable, Iterable

import bench_embed_norm
import bench_geglu
import bench_lora
import bench_prepare_inputs
import bench_qkv_rope_write
import bench_quantize_rows
import bench_rms_norm
import bench_sample
import bench_sandwich_norm
import pytest
import torch
from timing import Case

CASES: dict[str, Callable[[], Iterable[Case]]] = {
    "rms_norm": lambda: bench_rms_norm.cases(3, 640, "cpu"),
    "sandwich_norm": lambda: bench_sandwich_norm.cases(3, 640, "cpu"),
    "embed_norm": lambda: bench_embed_norm.cases(3, 640, 50, "cpu"),
    "geglu": lambda: bench_geglu.cases(3, 2048, "cpu"),
    "qkv_rope_write, bf16": lambda: bench_qkv_rope_write.cases("270M", 3, False, "cpu"),
    "qkv_rope_write, e4m3": lambda: bench_qkv_rope_write.cases("270M", 3, True, "cpu"),
    "quantize_rows": lambda: bench_quantize_rows.cases(3, 640, "cpu"),
    "lora": lambda: bench_lora.cases("270M qkv", 3, 2, 16, "cpu"),
    "prepare_inputs": lambda: bench_prepare_inputs.cases(3, 100, "cpu"),
    **{
        f"sample, {kind}": lambda kind=kind: bench_sample.cases(kind, 2, 3000, 2048, "cpu")
        for kind in bench_sample.KINDS
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_and_passes_its_own_check(name: str) -> None:
    torch.manual_seed(0)
    for case in CASES[name]():
        case.run()
        case.check()
        assert case.moved_bytes > 0


@pytest.mark.parametrize("name", CASES)
def test_a_case_that_did_not_run_fails_its_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs hold what stood in memory: here, nothing finite."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _spoilt(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _spoilt(empty_like(*a, **k)))
    case = next(iter(CASES[name]()))
    with pytest.raises(AssertionError):
        case.check()


def _spoilt(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() and x.itemsize > 1 else x


def test_bytes_by_hand() -> None:
    (ours, _) = bench_sandwich_norm.cases(3, 640, "cpu")
    assert ours.moved_bytes == 4 * 3 * 640 * 2 + 2 * 640 * 4
    (ours, _) = bench_geglu.cases(3, 2048, "cpu")
    assert ours.moved_bytes == 3 * 3 * 2048 * 2
    (ours,) = bench_qkv_rope_write.cases("270M", 3, True, "cpu")
    assert ours.moved_bytes == 3 * (6 * 256 * 2 + 4 * 256 * 2 + 2 * (256 + 4) + 256 * 4)
    (ours, _) = bench_quantize_rows.cases(3, 640, "cpu")
    assert ours.moved_bytes == 3 * 640 * (2 + 1) + 3 * 4
    (ours, _) = bench_lora.cases("270M qkv", 3, 2, 16, "cpu")
    assert ours.shape["adapter_bytes"] == 2 * 16 * (3 * 640 + 1536) * 2
    assert ours.moved_bytes == 2 * 16 * (3 * 640 + 1536) * 2 + 3 * 640 * 2 + 2 * 3 * 1536 * 2
