"""The programs of a GPU check on a CPU: each finds what it must find, and what the shares are of."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import bench_decode
import bench_offline
import bench_prefill
import check_kernels
import check_parity
import check_same_tokens
import numpy as np
import pytest
import random_engine
import torch
from cases import Absent
from check_tests import RowPerTest
from device_rates import floor_ms
from gpu_rates import Rates
from random_weights import configuration, oracle, tensor
from torch import Tensor

from cabochon.engine.sampling_params import SamplingParams

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "billions"), [("2b", 2.61), ("9b", 9.24), ("27b", 27.23)])
def test_sizes_are_gemmas(size: str, billions: float) -> None:
    """Parameters as Google counts them, the tied embedding once."""
    config = configuration(size)
    with torch.device("meta"):
        model = type(oracle(configuration("tiny"), torch.bfloat16, CPU))(config)
    count = sum(weight.numel() for weight in model.parameters())
    assert round(count / 1e9, 2) == billions
    assert random_engine.num_weights(config) == pytest.approx(count, rel=1e-3)  # norms are small
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.layer_types[:2] == ["sliding_attention", "full_attention"]


def test_weights_are_the_same_on_every_call_and_in_every_precision() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    first, other = (tensor(name, (32, 64), torch.float32, CPU) for name in names)
    assert torch.equal(first, tensor(names[0], (32, 64), torch.bfloat16, CPU).float())
    assert not torch.equal(first, other)
    assert 0.1 < first.std() * 8 < 1.2


def test_a_wrong_logit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parity = check_parity.Parity(configuration("tiny"), (1, 7), "cpu", new_tokens=4)
    assert [row["equal_tokens"] for row in check_parity.fp32(parity)] == [8]
    list(check_parity.bf16(parity))
    ours = parity.ours

    def spoilt(dtype: str, **options: object) -> tuple[list[Tensor], object]:
        logits, core = ours(dtype, **options)
        return [one * (1.2 if dtype == "bf16" else 1.01) for one in logits], core

    monkeypatch.setattr(parity, "ours", spoilt)
    with pytest.raises(AssertionError, match=r"logits are .* from transformers', at most 0.001"):
        list(check_parity.fp32(parity))
    with pytest.raises(AssertionError, match="over budget"):
        list(check_parity.bf16(parity))


def test_a_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parity = check_parity.Parity(configuration("tiny"), (7,), "cpu", new_tokens=4)
    generate = check_parity.generate
    monkeypatch.setattr(check_parity, "generate", lambda *a: [[0, *one[1:]] for one in generate(*a)])
    with pytest.raises(AssertionError, match="3 of 4 greedy tokens equal transformers'"):
        list(check_parity.fp32(parity))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_options_that_change_nothing_pass_and_others_do_not(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an option that is there today; other sampling stands for a runner that is wrong."""
    chosen = ({"page_tokens": 16}, {"page_tokens": 8})
    monkeypatch.setitem(check_same_tokens.PAIRS, "pages", chosen)
    compare = check_same_tokens.compare
    config, lengths = configuration("tiny"), check_same_tokens.LENGTHS[:4]
    (row,) = compare(config, lengths, "pages", "fp32", "cpu")
    assert row["equal_tokens"] == row["tokens"] == sum(check_same_tokens.MAX_TOKENS[:4])
    calls = iter(range(2))
    generate = check_same_tokens.generate

    def spoilt(*args: object) -> list[list[int]]:
        tokens = generate(*args)
        return [[one[0] + 1, *one[1:]] for one in tokens] if next(calls) else tokens

    monkeypatch.setattr(check_same_tokens, "generate", spoilt)
    if dtype == "bf16":  # reported, not promised
        (row,) = compare(config, lengths, "pages", "bf16", "cpu")
        assert int(str(row["equal_tokens"])) <= sum(check_same_tokens.MAX_TOKENS[:4]) - 4
    else:
        with pytest.raises(AssertionError, match="104 of 108 tokens are equal: pages"):
            list(compare(config, lengths, "pages", "fp32", "cpu"))


def test_an_option_that_is_not_there_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_same_tokens.PAIRS, "new", ({"no_such_option": 1}, {"no_such_option": 2}))
    with pytest.raises(Absent, match="EngineConfig has no no_such_option"):
        list(check_same_tokens.compare(configuration("tiny"), (1,), "new", "fp32", "cpu"))
    monkeypatch.setitem(bench_decode.VARIANTS, "new", {"no_such_option": 1})
    with pytest.raises(Absent, match="EngineConfig has no no_such_option"):
        bench_decode.options_of("new")


def test_the_floor_is_the_slower_of_bytes_and_products() -> None:
    rates = Rates(copy_gb_per_s=1000, product_tflop_per_s=100)
    assert floor_ms(2e9, 1e11, rates) == 2
    assert floor_ms(2e9, 1e12, rates) == 10


def test_the_floor_of_decode_by_hand() -> None:
    _, info, model, _ = tiny_core()
    lens = np.array([10, 100])
    keys = 2 * (10 + 24) + 2 * (10 + 100)  # two sliding layers with a window of 24, two global ones
    assert random_engine.visible_keys(model, lens) == keys
    assert random_engine.key_bytes(model, 2) == 2 * 2 * 16 * 2
    rates = Rates(copy_gb_per_s=1, product_tflop_per_s=1e6)
    floor = bench_decode.decode_floor_ms(model, info, lens, rates, 2)
    assert floor == pytest.approx((info.weight_bytes + keys * 128) / 1e6)


def tiny_core() -> random_engine.Engine:
    return random_engine.make_core(
        configuration("tiny"), "cpu", "bf16", max_seqs=2, max_tokens=120, step_tokens=64
    )


def test_the_work_of_prefill_by_hand() -> None:
    _, info, model, _ = tiny_core()
    matrices = 4 * (64 * 16 * (4 + 2 * 2 + 4) + 3 * 64 * 96)  # q, k, v, o; gate, up, down
    info = argparse.Namespace(weight_bytes=2 * (matrices + 512 * 64))  # as on a GPU, where the head is tied
    pairs = 2 * (30 * 31 // 2) + 2 * (24 * 25 // 2 + 6 * 24)
    expected = 3 * (2 * matrices * 30 + 2 * 512 * 64 + 4 * 4 * 16 * pairs)
    assert bench_prefill.prefill_flops(model, info, 3, 30, 2) == expected


def test_decode_is_timed_with_every_sequence_decoding() -> None:
    core, *_ = random_engine.make_core(
        configuration("tiny"), "cpu", "fp32", max_seqs=3, max_tokens=200, step_tokens=16
    )
    sequences = bench_decode.Sequences(core, random_engine.random_prompts(512, [40, 40, 40]), 90)
    before = sequences.lens
    _, tokens = sequences.run(5)
    assert tokens == 15
    assert (sequences.lens - before).tolist() == [5, 5, 5]
    sequences.end()
    assert not core.has_work


def test_generated_tokens_are_transformers_own() -> None:
    """The engine on random weights, and the oracle on the same: tied by names alone."""
    core, *_ = random_engine.make_core(
        configuration("tiny"), "cpu", "fp32", max_seqs=2, max_tokens=100, step_tokens=64
    )
    prompt = random_engine.random_prompts(512, [30])[0]
    (tokens,) = random_engine.generate(
        core, [prompt], [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)]
    )
    model, ids = oracle(configuration("tiny"), torch.float32, CPU), list(prompt)
    for _ in range(6):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokens == ids[30:]


def test_a_peer_that_fails_leaves_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> object:
        raise RuntimeError("not on this machine")

    monkeypatch.setitem(bench_offline.PROVIDERS, "transformers generate_batch", broken)
    args = argparse.Namespace(size="tiny", device="cpu", seqs=2, prompt_tokens=8, output_tokens=3, rounds=2)
    rows = list(bench_offline.offline(args))
    assert [row.get("error") for row in rows] == ["RuntimeError", None, None, None]
    assert "cabochon" in rows[-1]
    assert "ratio" not in rows[-1]


@pytest.mark.parametrize("family", check_kernels.families("cpu"))
def test_each_kernel_family_runs_once(family: str, triton_interpreter: None) -> None:
    rows = list(check_kernels.families("cpu")[family]())
    assert rows
    assert all(row["is_right"] for row in rows)


def test_each_test_leaves_a_row(tmp_path: Path, pytester_like: Path) -> None:
    out = tmp_path / "rows"
    with out.open("w") as file:
        pytest.main(["-q", "-p", "no:cacheprovider", str(pytester_like)], plugins=[RowPerTest(file)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["test"].rpartition("::")[2], row["outcome"]) for row in rows] == [
        ("test_good", "passed"),
        ("test_bad", "failed"),
        ("test_absent", "skipped"),
    ]
    assert "assert 1 == 2" in rows[1]["message"]


@pytest.fixture
def pytester_like(tmp_path: Path) -> Path:
    """A file of three tests."""
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest\n\ndef test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2\n\n"
        "def test_absent():\n    pytest.skip('no tool')\n"
    )
    return path
