"""Steps without logits: the same tokens alone, among others and by the logits, or no screen at all."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import absent
from torch import Tensor
from transformers import AutoModelForCausalLM

from cabochon.engine.llm import LLM
from cabochon.engine.models.native_gemma import NativeGemma
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.screen import Screen, screen_of
from cabochon.kernels.native.library import library
from cabochon.kernels.native.screen import can_screen
from cabochon.kernels.sampling import Draw

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(seed=3, max_tokens=40, ignore_eos=True)
TRUNCATED = SamplingParams(seed=3, top_k=5, max_tokens=40, ignore_eos=True)
PROMPTS = [[5 + i, 9, 20 + i] for i in range(8)]


@pytest.fixture
def _vnni() -> None:
    if library() is None:
        absent("no C library for this CPU: it is built by pip install, with a C compiler")
    if not can_screen():
        pytest.skip("a CPU without VNNI has no use for a screen")


def random(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("_vnni")
def test_there_is_a_screen_where_it_is_faster_and_misses_nothing() -> None:
    embedding = random(100, 64)
    assert screen_of(embedding) is not None
    assert screen_of(embedding.float()) is None
    assert screen_of(random(100, 72)) is None
    assert screen_of(embedding * 1e-20) is None
    for broken in (torch.nan, torch.inf):
        embedding[70, 3] = broken
        assert screen_of(embedding) is None


def test_without_vnni_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.engine.screen.can_screen", lambda: False)
    assert screen_of(random(100, 64)) is None


@pytest.mark.usefixtures("_vnni")
def test_a_row_that_cannot_be_told_is_named() -> None:
    screen, x = Screen(random(9000, 64)), random(3, 64, seed=1)
    for draws in ([None] * 3, [Draw(row, 1.0, 7, row) for row in range(3)]):
        x[1] = 1
        told = screen(x, draws, None)
        assert None not in told
        x[1] = torch.nan
        assert screen(x, draws, None) == [told[0], None, told[2]]


@pytest.mark.usefixtures("_vnni")
def test_slack_covers_what_rounding_moves() -> None:
    """Nearly equal tokens, whose products have the worst error that a sum in fp32 may have."""
    embedding = random(1, 256) + 0.004 * random(400, 256, seed=2)
    screen, x = Screen(embedding), random(300, 256, seed=1) * 3
    found = screen(x, [None] * 300, None)
    assert found is not None
    norms = x.double().norm(dim=1)[:, None] * embedding.double().norm(dim=1)
    signs = random(300, 400, torch.float64, seed=3).sign()
    rounded = (x.double() @ embedding.double().T + 256 * 2.0**-24 * norms * signs).bfloat16()
    highest = rounded.amax(1)
    own = rounded.gather(1, torch.tensor(found)[:, None])[:, 0]
    assert (own < highest).any(), "not only ties"
    assert (own >= screen.slack(x).below(highest)).all()


class Spy:
    """Counts the steps that needed no logits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = 0
        next_tokens = NativeGemma.next_tokens

        def spied(*args: Any) -> list[int | None] | None:
            found = next_tokens(*args)
            self.num_steps += found is not None
            return found

        monkeypatch.setattr(NativeGemma, "next_tokens", spied)


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [each.token_ids for each in llm.generate(PROMPTS[: len(params)], params)]


@pytest.mark.usefixtures("_vnni")
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_tokens_are_the_same_alone_and_beside_others_and_by_the_logits(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    directory = str(request.getfixturevalue(model))
    options = {"dtype": "bf16", "kv_cache_gib": 0.02, "threads": 1, "prefix_caching": False}
    params = [GREEDY, *(replace(DRAWN, seed=seed, temperature=0.5 + seed / 5) for seed in range(3))] * 2
    spy = Spy(monkeypatch)
    llm = LLM(directory, **options)
    screened = tokens(llm, params)
    assert spy.num_steps >= 40
    spy.num_steps = 0
    mixed = tokens(llm, [each if i % 4 else TRUNCATED for i, each in enumerate(params)])
    assert spy.num_steps == 0
    assert [mixed[i] for i in range(8) if i % 4] == [screened[i] for i in range(8) if i % 4]
    mixed = tokens(llm, [each if i % 2 == 0 else TRUNCATED for i, each in enumerate(params)])
    assert mixed[::2] == screened[::2]
    monkeypatch.setattr(NativeGemma, "next_tokens", lambda *_: None)
    assert tokens(llm, params) == screened
    monkeypatch.setattr("cabochon.engine.models.native_gemma.screen_of", lambda _: None)
    plain = LLM(directory, **options)
    assert tokens(plain, [GREEDY] * 8)[::4] == screened[::4], "draws are of rounded logits there"
    assert llm.info.weight_bytes > plain.info.weight_bytes


@pytest.mark.usefixtures("_vnni")
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_rows_that_are_left_are_told_by_their_logits_and_no_others(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    options = {"dtype": "bf16", "kv_cache_gib": 0.02, "threads": 1, "prefix_caching": False}
    llm = LLM(str(request.getfixturevalue(model)), **options)
    params = [GREEDY, DRAWN, replace(DRAWN, seed=8, temperature=0.4), GREEDY] * 2
    screened = tokens(llm, params)
    next_tokens, logits = NativeGemma.next_tokens, NativeGemma.logits
    num_steps, rows = 0, []

    def forgetful(*args: Any) -> list[int | None] | None:
        nonlocal num_steps
        num_steps += 1
        told = next_tokens(*args)
        assert told is not None
        return [None if (index + num_steps) % 3 == 0 else token_id for index, token_id in enumerate(told)]

    def counted(self: NativeGemma, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(NativeGemma, "next_tokens", forgetful)
    monkeypatch.setattr(NativeGemma, "logits", counted)
    assert tokens(llm, params) == screened
    assert num_steps >= 40
    assert max(rows) == 4, "three of eight, padded"


@pytest.fixture
def alike_dir(tiny_gemma3_dir: Path, tmp_path: Path) -> str:
    """A model whose tokens are nearly the same, so that rounding decides if it may."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma3_dir)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(weight[40] + 0.01 * weight)
    model.save_pretrained(tmp_path)
    shutil.copy(tiny_gemma3_dir / "tokenizer.json", tmp_path)
    return str(tmp_path)


@pytest.mark.usefixtures("_vnni")
def test_tokens_that_are_nearly_the_same_are_told_apart_in_any_company(
    alike_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(alike_dir, dtype="bf16", kv_cache_gib=0.02, threads=1, prefix_caching=False)
    params = [GREEDY, *(replace(DRAWN, seed=seed, temperature=0.01) for seed in range(3))] * 2
    spy = Spy(monkeypatch)
    screened = tokens(llm, params)
    assert spy.num_steps >= 40
    monkeypatch.setattr(NativeGemma, "next_tokens", lambda *_: None)
    assert tokens(llm, params) == screened
    monkeypatch.setattr(NativeGemma, "slack", lambda *_: None)
    rounded = tokens(llm, params)
    assert any(rounded[i] != screened[i] for i in range(8) if i % 4), "draws of rounded logits are others"


@pytest.mark.usefixtures("_vnni")
@pytest.mark.parametrize(
    "name", ["logprobs", "min_tokens", "logit_bias", "top_k", "top_p", "min_p", "presence_penalty"]
)
def test_whoever_wants_more_than_a_token_gets_logits(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    values = {"logit_bias": {9: 1.0}, "top_p": 0.5, "min_p": 0.5}
    fields: dict[str, object] = {name: values.get(name, 2)}
    spy = Spy(monkeypatch)
    llm = LLM(str(tiny_gemma2_dir), dtype="bf16", kv_cache_gib=0.02, threads=1)
    temperature = float(name in ("top_k", "top_p", "min_p"))
    llm.generate([[9, 10]], SamplingParams(temperature=temperature, max_tokens=2, **fields))
    assert spy.num_steps == 0


@pytest.mark.usefixtures("_vnni")
def test_int8_has_a_screen_for_greedy_steps_alone(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    options = {"dtype": "bf16", "kv_cache_gib": 0.02, "threads": 1, "prefix_caching": False}
    llm = LLM(str(tiny_gemma2_dir), quantization="int8", **options)
    screened = tokens(llm, [GREEDY] * 8)
    assert spy.num_steps >= 40
    spy.num_steps = 0
    mixed = tokens(llm, [GREEDY, DRAWN] * 4)
    assert spy.num_steps == 0
    assert mixed[::2] == screened[::2]
    monkeypatch.setattr(NativeGemma, "next_tokens", lambda *_: None)
    assert tokens(llm, [GREEDY] * 8) == screened
    assert tokens(llm, [GREEDY, DRAWN] * 4) == mixed


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"quantization": "fp8"}])
def test_other_heads_have_no_screen(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    spy = Spy(monkeypatch)
    LLM(str(tiny_gemma2_dir), kv_cache_gib=0.02, threads=1, **options).generate([[9, 10]], GREEDY)
    assert spy.num_steps == 0
