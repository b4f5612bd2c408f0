"""Greedy steps without logits: the same tokens alone, among others and by the logits, or no screen at all."""

from pathlib import Path

import pytest
import torch
from tools import absent
from torch import Tensor

from cabochon.engine.llm import LLM
from cabochon.engine.models.native_gemma import NativeGemma
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.screen import Screen, screen_of
from cabochon.kernels.native.screen import can_screen

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(seed=3, top_k=5, max_tokens=40, ignore_eos=True)
PROMPTS = [[5 + i, 9, 20 + i] for i in range(8)]


@pytest.fixture
def _vnni() -> None:
    if not can_screen():
        absent("no VNNI on this CPU, or no C library")


def random(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("_vnni")
def test_there_is_a_screen_where_it_is_faster_and_misses_nothing() -> None:
    embedding = random(100, 64)
    assert screen_of(embedding) is not None
    assert screen_of(embedding.float()) is None
    assert screen_of(random(100, 72)) is None
    for broken in (torch.nan, torch.inf):
        embedding[70, 3] = broken
        assert screen_of(embedding) is None


def test_without_vnni_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.engine.screen.can_screen", lambda: False)
    assert screen_of(random(100, 64)) is None


@pytest.mark.usefixtures("_vnni")
def test_a_row_that_cannot_be_told_has_all_rows_looked_at() -> None:
    screen, x = Screen(random(9000, 64)), random(3, 64, seed=1)
    assert screen(x) is not None
    x[1] = 0
    assert screen(x) is None


@pytest.mark.usefixtures("_vnni")
def test_slack_covers_what_rounding_moves() -> None:
    """Nearly equal tokens, whose products have the worst error that a sum in fp32 may have."""
    embedding = random(1, 256) + 0.004 * random(400, 256, seed=2)
    screen, x = Screen(embedding), random(300, 256, seed=1) * 3
    found = screen(x)
    assert found is not None
    norms = x.double().norm(dim=1)[:, None] * embedding.double().norm(dim=1)
    signs = random(300, 400, torch.float64, seed=3).sign()
    rounded = (x.double() @ embedding.double().T + 256 * 2.0**-24 * norms * signs).bfloat16()
    highest = rounded.amax(1)
    own = rounded.gather(1, found[:, None])[:, 0]
    assert (own < highest).any(), "not only ties"
    assert (own >= screen.slack(x).below(highest)).all()


class Spy:
    """Counts the greedy steps that needed no logits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = 0
        likeliest = NativeGemma.likeliest

        def spied(model: NativeGemma, hidden: Tensor) -> Tensor | None:
            found = likeliest(model, hidden)
            self.num_steps += found is not None
            return found

        monkeypatch.setattr(NativeGemma, "likeliest", spied)


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [each.token_ids for each in llm.generate(PROMPTS[: len(params)], params)]


@pytest.mark.usefixtures("_vnni")
def test_greedy_tokens_are_the_same_alone_and_beside_draws_and_by_the_logits(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dtype": "bf16", "kv_cache_gib": 0.02, "threads": 1, "prefix_caching": False}
    spy = Spy(monkeypatch)
    llm = LLM(str(tiny_gemma2_dir), **options)
    screened = tokens(llm, [GREEDY] * 8)
    assert spy.num_steps >= 40
    spy.num_steps = 0
    mixed = tokens(llm, [GREEDY, DRAWN] * 4)
    assert spy.num_steps == 0
    assert mixed[::2] == screened[::2]
    monkeypatch.setattr("cabochon.engine.models.native_gemma.screen_of", lambda _: None)
    plain = LLM(str(tiny_gemma2_dir), **options)
    assert tokens(plain, [GREEDY] * 8) == screened
    assert spy.num_steps == 0
    assert llm.info.weight_bytes > plain.info.weight_bytes


@pytest.mark.usefixtures("_vnni")
@pytest.mark.parametrize("name", ["logprobs", "min_tokens", "logit_bias", "seed"])
def test_whoever_wants_more_than_the_likeliest_gets_logits(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fields: dict[str, object] = {name: {9: 1.0} if name == "logit_bias" else 2}
    spy = Spy(monkeypatch)
    llm = LLM(str(tiny_gemma2_dir), dtype="bf16", kv_cache_gib=0.02, threads=1)
    temperature = 1.0 if name == "seed" else 0.0
    llm.generate([[9, 10]], SamplingParams(temperature=temperature, max_tokens=2, **fields))
    assert spy.num_steps == 0


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"quantization": "int8"}, {"quantization": "fp8"}])
def test_other_heads_have_no_screen(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    spy = Spy(monkeypatch)
    LLM(str(tiny_gemma2_dir), kv_cache_gib=0.02, threads=1, **options).generate([[9, 10]], GREEDY)
    assert spy.num_steps == 0
