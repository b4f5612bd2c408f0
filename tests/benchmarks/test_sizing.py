"""The sizing table: committed as made, from the engine's own arithmetic, with nothing made up."""

import json
from pathlib import Path

import pytest
import sizing
from sizing import GPUS, model, row

H100, L4, A100 = (next(gpu for gpu in GPUS if gpu.name == name) for name in ("H100 80GB", "L4", "A100 80GB"))


def test_the_committed_table_is_what_the_program_makes() -> None:
    document = sizing.DOCUMENT.read_text()
    assert document == sizing.written(document), "run python benchmarks/sizing.py"


@pytest.mark.parametrize(("size", "parameters"), [("2b", 2.614), ("9b", 9.242), ("27b", 27.227)])
def test_weights_are_those_of_gemma_2(size: str, parameters: float) -> None:
    """Billions, of Gemma's model cards; norms are not counted."""
    assert model(size, "bf16").weight_bytes / 2e9 == pytest.approx(parameters, rel=2e-4)


def test_fp8_weights_are_half_of_the_layers_and_a_second_head() -> None:
    layers = model("9b", "bf16").weight_bytes - 2 * 256_000 * 3584
    values = layers / 2 + (2 + 1) * 256_000 * 3584
    assert model("9b", "fp8").weight_bytes == pytest.approx(values, rel=1e-3), "and a scale a row"
    assert model("9b", "fp8").read_bytes == pytest.approx(values - 2 * 256_000 * 3584, rel=1e-3)


def test_a_row_by_hand() -> None:
    """27B in bf16 on an H100: 46 layers in two groups of 23, 16 KV heads of 128, pages of 16 tokens."""
    made = row(H100, "27b", "bf16", "bf16", {})
    page_bytes = 2 * 23 * 16 * 16 * 128 * 2
    pages = (int(int(79.11 * 2**30) * 0.9) - 54_452_551_680 - 2**30) // page_bytes
    assert made["kv_tokens"] == pages // 2 * 16
    one = 8192 // 16 + -(-(4095 + 512) // 16) + 1  # a global table, and a window with a chunk before it
    assert made["sequences_8k"] == (pages - int(0.01 * pages)) // one == 8
    batch = made["batch"]
    read = 54_452_551_680 + 46 * batch * 1024 * 2 * 16 * 128 * 2
    assert made["tok_per_s"] == pytest.approx(0.7 * batch / (read / (0.9 * 3350e9)))


def test_what_cannot_be_says_why() -> None:
    assert row(L4, "27b", "fp8", "fp8", {})["why"] == "no room for KV pages"
    assert row(A100, "9b", "fp8", "bf16", {})["why"].startswith("fp8 products need")
    assert row(A100, "9b", "bf16", "fp8", {})["fits"]


def test_nine_billion_in_bf16_start_on_an_l4_with_a_shorter_context() -> None:
    made = row(L4, "9b", "bf16", "bf16", {})
    assert made["fits"]
    assert made["sequences_8k"] == 0
    assert "| not 8k |" in sizing.table([made])


def test_a_share_comes_from_the_largest_batch_of_a_result_file(tmp_path: Path) -> None:
    cases = [("decode 9b S=1", 1, 0.8), ("decode 9b S=128 fast", 128, 0.6), ("decode 9b S=128", 128, 0.5)]
    cases.append(("prefill 9b 8 x 1024", 256, 0.9))
    rows = [
        {"case": case, "size": "9b", "seqs": n, "share_of_roofline": share, "device": "NVIDIA H100 80GB HBM3"}
        for case, n, share in cases
    ]
    (tmp_path / "h100-2026-12-01.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert sizing.measured_share(H100, "9b", tmp_path) == (0.6, "h100-2026-12-01.jsonl")
    assert sizing.measured_share(H100, "2b", tmp_path) is None
    assert sizing.measured_share(L4, "9b", tmp_path) is None


def test_dollars_need_a_source_and_a_date() -> None:
    known = {"usd_per_hour": 3.6, "source": "a page", "date": "2026-01-31"}
    made = row(H100, "9b", "bf16", "bf16", {"H100 80GB": known})
    assert made["usd_per_million_tokens"] == pytest.approx(1000 / made["tok_per_s"])
    for missing in ("source", "date"):
        prices = {"H100 80GB": {name: value for name, value in known.items() if name != missing}}
        assert row(H100, "9b", "bf16", "bf16", prices)["usd_per_million_tokens"] is None
