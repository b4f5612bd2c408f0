"""Logits of mixed batches of three adapters and the base model, against transformers and peft, in fp32."""

from typing import Any

import numpy as np
import pytest
import torch
from adapted_gemma import RANKS, AdaptedGemma
from forward import Forward
from random_gemma import random_gemma2, random_gemma3
from tools import absent

from cabochon.engine.adapters.deltas import AdapterWeights, TorchAdapterWeights
from cabochon.engine.adapters.native_deltas import NativeAdapterWeights
from cabochon.engine.models.native_gemma import NativeGemma
from cabochon.kernels.definitions import softcap_
from cabochon.kernels.native.library import library

CPU = torch.device("cpu")
NAMES = [*RANKS, None]
MAKE = {"gemma2": random_gemma2, "gemma3": random_gemma3}


@pytest.fixture(scope="module", params=MAKE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedGemma:
    return AdaptedGemma(MAKE[request.param], tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=["torch", "native"])
def gemma(
    request: pytest.FixtureRequest, made: AdaptedGemma, monkeypatch: pytest.MonkeyPatch
) -> AdaptedGemma:
    """For each backend of a CPU."""
    monkeypatch.setattr(made, "backend", request.param, raising=False)
    if request.param == "native" and library() is None:
        absent("no C library for this CPU: it is built by pip install, with a C compiler")
    return made


def filled(gemma: AdaptedGemma, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    weights: AdapterWeights
    if gemma.backend == "native":
        weights = NativeAdapterWeights(gemma.config, 4, dtype)
    else:
        weights = TorchAdapterWeights(gemma.config, 4, dtype, CPU)
    for slot, name in enumerate(RANKS):
        weights.put(slot, gemma.read(name, dtype))
    return weights


def forward_of(gemma: AdaptedGemma, adapters: AdapterWeights | None = None) -> Forward:
    return Forward(gemma.config, gemma.weights, adapters=adapters or filled(gemma), **kind_of(gemma))


def kind_of(gemma: AdaptedGemma) -> dict[str, Any]:
    return {"model_class": NativeGemma, "backend": "native"} if gemma.backend == "native" else {}


def slot_of(name: str | None) -> int:
    return -1 if name is None else list(RANKS).index(name)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(6, 130, length).tolist()


def capped(gemma: AdaptedGemma, logits: torch.Tensor) -> torch.Tensor:
    cap = gemma.config.final_softcap
    return logits if cap is None else softcap_(logits.clone(), cap)


def assert_oracle(gemma: AdaptedGemma, name: str | None, ids: list[int], logits: torch.Tensor) -> None:
    """logits: of the last tokens of ids."""
    expected = gemma.logits(name, ids)[-len(logits) :]
    torch.testing.assert_close(capped(gemma, logits), expected, atol=1e-4, rtol=0)


def test_adapters_change_the_logits(gemma: AdaptedGemma) -> None:
    """Or the other tests would show nothing."""
    ids = prompt(12, 0)
    all_logits = [gemma.logits(name, ids) for name in NAMES]
    for index, one in enumerate(all_logits):
        for other in all_logits[index + 1 :]:
            assert (one - other).abs().max() > 0.5


@pytest.mark.parametrize("chunk", [1, 3, 7, 40])
def test_a_mixed_batch_at_every_chunking(gemma: AdaptedGemma, chunk: int) -> None:
    forward = forward_of(gemma)
    prompts = {name: prompt(21 + index, index) for index, name in enumerate(NAMES)}
    rows = {name: forward.add(ids, slot_of(name)) for name, ids in prompts.items()}
    made: dict[str | None, list[torch.Tensor]] = {name: [] for name in NAMES}
    while left := {
        name: min(chunk + index, len(prompts[name]) - int(forward.rows.num_computed[rows[name]]))
        for index, name in enumerate(NAMES)
        if forward.rows.num_computed[rows[name]] < len(prompts[name])
    }:
        outs = forward.step([(rows[name], n) for name, n in left.items()])
        for name, logits in zip(left, outs, strict=True):
            made[name].append(logits)
    for name, ids in prompts.items():
        assert_oracle(gemma, name, ids, torch.cat(made[name]))


def test_a_prefix_from_the_cache_and_decodes(gemma: AdaptedGemma) -> None:
    forward = forward_of(gemma)
    firsts = {name: prompt(20, index) for index, name in enumerate(NAMES)}
    owners = {name: forward.add(ids, slot_of(name)) for name, ids in firsts.items()}
    forward.step([(row, 20) for row in owners.values()])
    seconds = {name: [*ids[:16], *prompt(9, 50)] for name, ids in firsts.items()}
    rows = {name: forward.add(ids, slot_of(name)) for name, ids in seconds.items()}
    for name, row in rows.items():
        forward.attach(row, owners[name], 4)
    for num_tokens in (7, 1, 1):
        outs = forward.step([(row, num_tokens) for row in rows.values()])
        for (name, ids), logits in zip(seconds.items(), outs, strict=True):
            done = int(forward.rows.num_computed[rows[name]])
            assert_oracle(gemma, name, ids[:done], logits)


def test_a_slot_can_be_emptied_and_filled_anew(gemma: AdaptedGemma) -> None:
    weights = filled(gemma)
    weights.put(0, None)
    weights.put(0, gemma.read("sixtyfour"))
    weights.put(2, gemma.read("eight"))
    weights.put(1, None)
    forward = forward_of(gemma, weights)
    ids = prompt(10, 3)
    rows = [forward.add(ids, slot) for slot in (0, 2, -1)]
    for name, logits in zip(
        ("sixtyfour", "eight", None), forward.step([(row, 10) for row in rows]), strict=True
    ):
        assert_oracle(gemma, name, ids, logits)


def test_a_step_of_the_base_model_alone_adds_nothing(gemma: AdaptedGemma) -> None:
    weights = filled(gemma)
    assert weights.step(np.array([-1, -1]), np.array([3, 4]), 8) is None
    ids = prompt(9, 4)
    plain = Forward(gemma.config, gemma.weights, **kind_of(gemma))
    forward = forward_of(gemma)
    (expected,) = plain.step([(plain.add(ids), 9)])
    (alone,) = forward.step([(forward.add(ids), 9)])
    assert torch.equal(alone, expected)
    mixed = forward.step([(forward.add(ids), 9), (forward.add(ids, 0), 9)])
    assert torch.equal(mixed[0], expected), "a neighbour's adapter changes the base model's bits"


def test_bits_of_a_row_do_not_depend_on_its_neighbours_in_bf16(gemma: AdaptedGemma) -> None:
    weights = filled(gemma, torch.bfloat16)
    ids = {name: prompt(13, index) for index, name in enumerate(NAMES)}

    def run(names: list[str | None]) -> dict[str | None, torch.Tensor]:
        forward = Forward(gemma.config, gemma.weights, dtype=torch.bfloat16, adapters=weights)
        rows = [forward.add(ids[name], slot_of(name)) for name in names]
        forward.step([(row, 12) for row in rows])
        return dict(zip(names, forward.step([(row, 1) for row in rows]), strict=True))

    together = run(NAMES)
    for name in NAMES:
        assert torch.equal(run([name])[name], together[name])
