"""The step loop: what a NaN costs, what is measured and when, and the logits that `verify` compares."""

import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from random_gemma import oracle_logits
from transformers import AutoModelForCausalLM

from cabochon.engine import core as core_module
from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.load import load_engine
from cabochon.engine.messages import GenerateRequest, Refusal
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.sampling_params import SamplingParams

BAD = 77  # a token whose embedding the tests make NaN
STEP_S = 0.5  # what a step takes by the clock of `clocked`
NAN_MESSAGE = "logits must be finite, the model gave NaN: check it with `cabochon verify`"


def core_of(directory: Path, **options: object) -> EngineCore:
    defaults = {
        "model": "tiny", "dtype": "fp32", "page_tokens": 4, "max_seqs": 64, "step_tokens": 128,
        "kv_cache_gib": 0.01, "threads": 1,
    }  # fmt: skip
    return load_engine(EngineConfig(**{**defaults, **options}), directory)[0]


def add(core: EngineCore, name: str, prompt: list[int], max_tokens: int = 8, **fields: object) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    core.add(GenerateRequest(request_id=name, prompt_ids=prompt, params=params, **fields))


def run(core: EngineCore) -> tuple[dict[str, list[int]], list[Refusal]]:
    """Step until nothing is left. Tokens by request, and the refusals."""
    tokens: dict[str, list[int]] = {}
    refusals: list[Refusal] = []
    while core.has_work:
        outputs, refused = core.step()
        for output in outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        refusals += refused
    return tokens, refusals


def poison(core: EngineCore) -> None:
    core._runner._model._embedding[BAD] = torch.nan


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clocked(tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    """A core by whose clock every step takes STEP_S."""
    ticks = iter(range(10**6))
    clock = types.SimpleNamespace(monotonic=lambda: next(ticks) * STEP_S)
    monkeypatch.setattr(core_module, "time", clock)
    return core_of(tiny_gemma2_dir, prefix_caching=False)


def test_nan_ends_its_request_and_the_others_never_notice(tiny_gemma2_dir: Path) -> None:
    prompts = {"a": [8, 9, 10], "b": [11] * 30, "c": [12, 13]}
    clean = core_of(tiny_gemma2_dir)
    for name, prompt in prompts.items():
        add(clean, name, prompt)
    expected, _ = run(clean)
    core = core_of(tiny_gemma2_dir)
    poison(core)
    add(core, "early", [8, BAD, 9])
    for name, prompt in prompts.items():
        add(core, name, prompt)
    add(core, "late", [14, 15, BAD])
    tokens, refusals = run(core)
    assert tokens == expected
    assert [(r.request_id, r.error, r.message, r.param) for r in refusals] == [
        ("early", "ComputeError", NAN_MESSAGE, None),
        ("late", "ComputeError", NAN_MESSAGE, None),
    ]
    assert core.stats().pages_used == core.stats().running == 0


def test_nan_in_the_last_token_is_refused_and_not_sent(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir)
    poison(core)
    add(core, "a", [8, BAD], max_tokens=1)
    tokens, refusals = run(core)
    assert tokens == {}
    assert [refusal.request_id for refusal in refusals] == ["a"]


def test_nan_in_a_chunk_shows_when_the_prompt_is_computed(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir, step_tokens=64)
    poison(core)
    add(core, "a", [BAD, *[9] * 150])
    assert core.step() == ([], [])
    tokens, refusals = run(core)
    assert tokens == {}
    assert len(refusals) == 1
    assert core.stats().steps == 3


def test_a_request_that_turns_nan_while_it_decodes_keeps_what_it_had(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir)
    add(core, "a", [8, 9])
    first = core.step()[0]
    core._runner._model._embedding[first[0].token_ids[0]] = torch.nan
    assert core.step()[0] == []
    assert not core.has_work


def test_pages_that_held_nan_are_used_again_without_harm(tiny_gemma2_dir: Path) -> None:
    layout = kv_layout(load_model_config(tiny_gemma2_dir), 4, 4)
    core = core_of(tiny_gemma2_dir, kv_cache_gib=31 * layout.page_bytes / 2**30, prefix_caching=False)
    add(core, "a", [8, 9, 10], max_tokens=20)
    expected, _ = run(core)
    embedding = core._runner._model._embedding
    saved = embedding[BAD].clone()
    poison(core)
    add(core, "bad", [BAD] * 50)
    assert len(run(core)[1]) == 1
    assert core._runner._attention._pages.k[0].isnan().any()
    embedding[BAD] = saved
    add(core, "a", [8, 9, 10], max_tokens=20)
    assert run(core) == (expected, [])


def test_an_idle_core_steps_without_a_step(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir)
    assert core.step() == ([], [])
    assert core.stats().steps == 0
    for name in ("unknown", ""):
        core.abort(name)
        core.publish(name)
    assert not core.has_work


def test_stats_count_steps_and_the_tokens_of_the_last_one(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir)
    add(core, "a", [9] * 20, max_tokens=3)
    add(core, "b", [8] * 30, max_tokens=2)
    seen = []
    while core.has_work:
        core.step()
        stats = core.stats()
        seen.append((stats.steps, stats.step_tokens, stats.prompt_tokens, stats.generation_tokens))
    assert seen == [(1, 50, 50, 2), (2, 2, 50, 4), (3, 1, 50, 5)]


def test_the_rate_is_that_of_the_first_prefill_and_decodes_leave_it(clocked: EngineCore) -> None:
    assert clocked.stats().prefill_tokens_per_s == 0
    add(clocked, "a", [9] * 40, max_tokens=5)
    rates = []
    while clocked.has_work:
        clocked.step()
        rates.append(clocked.stats().prefill_tokens_per_s)
    assert rates == [40 / STEP_S] * 5


def test_a_later_prefill_moves_the_rate_by_a_tenth(clocked: EngineCore) -> None:
    for length in (40, 100):
        add(clocked, "a", [9] * length, max_tokens=1)
        clocked.step()
    assert clocked.stats().prefill_tokens_per_s == pytest.approx(0.9 * 80 + 0.1 * 200)


@pytest.mark.parametrize(("length", "rate"), [(31, 0), (32, 32 / STEP_S)])
def test_a_few_tokens_say_nothing_of_the_rate(clocked: EngineCore, length: int, rate: float) -> None:
    add(clocked, "a", [9] * length, max_tokens=1)
    clocked.step()
    assert clocked.stats().prefill_tokens_per_s == rate


@pytest.mark.parametrize(("length", "rate"), [(39, 0), (40, 40 / STEP_S)])
def test_a_step_that_is_mostly_decodes_says_nothing_of_the_rate(
    clocked: EngineCore, length: int, rate: float
) -> None:
    for i in range(40):
        add(clocked, f"{i}", [9 + i] * 2, max_tokens=3)
    clocked.step()  # 80 tokens of prefill
    clocked._prefill_tokens_per_s = 0.0
    add(clocked, "a", [9] * length, max_tokens=1)
    clocked.step()
    assert clocked.stats().step_tokens == 40 + length
    assert clocked.stats().prefill_tokens_per_s == rate


@pytest.mark.parametrize("directory", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
@pytest.mark.parametrize("length", [1, 7, 130])
def test_prompt_logits_are_transformers_last_ones_and_leave_nothing(
    request: pytest.FixtureRequest, directory: str, length: int
) -> None:
    path = request.getfixturevalue(directory)
    core = core_of(path)
    add(core, "before", [9] * 40)
    run(core)
    before = core.stats()
    ids = [(7 * i) % 250 + 10 for i in range(length)]
    logits = core.prompt_logits(ids)
    oracle = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    torch.testing.assert_close(logits, oracle_logits(oracle, ids)[-1], atol=1e-4, rtol=0)
    assert core.stats().pages_used == 0
    assert core.stats().steps == before.steps
    assert core._rows.num_free == 64
    core.scheduler.check()


def test_prompt_logits_wait_until_the_engine_is_idle(tiny_gemma2_dir: Path) -> None:
    core = core_of(tiny_gemma2_dir)
    add(core, "a", [8, 9])
    with pytest.raises(AssertionError, match="the rows are in use"):
        core.prompt_logits([8, 9])


def test_prompt_logits_of_a_prompt_over_the_pool_are_refused_and_nothing_is_lost(
    tiny_gemma2_dir: Path,
) -> None:
    layout = kv_layout(load_model_config(tiny_gemma2_dir), 4, 4)
    num_pages = layout.pages_per_sequence(512, 64)
    core = core_of(
        tiny_gemma2_dir, step_tokens=64, kv_cache_gib=(num_pages + 0.5) * layout.page_bytes / 2**30
    )
    for _ in range(80):
        with pytest.raises(ValueError, match="the pool must hold all 512 tokens at once: raise kv_cache_gib"):
            core.prompt_logits([9] * 512)
    assert core.prompt_logits([9] * 20).isfinite().all()
    core.scheduler.check()


@pytest.mark.parametrize("act", [EngineCore.abort, EngineCore.publish], ids=["abort", "publish"])
def test_an_abort_frees_pages_at_once_and_a_publish_only_offers_them(
    tiny_gemma2_dir: Path, act: Callable[[EngineCore, str], None]
) -> None:
    core = core_of(tiny_gemma2_dir)
    add(core, "a", list(range(10, 30)), is_private=True)
    core.step()
    act(core, "a")
    is_abort = act is EngineCore.abort
    assert (core.stats().pages_used == 0) is is_abort
    add(core, "b", [*range(10, 30), 5], max_tokens=1)
    outputs, _ = core.step()
    assert outputs[-1].cached_tokens == (0 if is_abort else 20)


def test_pages_of_a_request_that_gave_nan_are_not_found_by_the_next_one(tiny_gemma2_dir: Path) -> None:
    prompt = [8, 9, BAD, *range(10, 30)]
    clean = core_of(tiny_gemma2_dir)
    add(clean, "a", prompt)
    expected, _ = run(clean)
    core = core_of(tiny_gemma2_dir)
    weights = core._runner._model._embedding  # type: ignore[attr-defined]
    good = weights[BAD].clone()
    poison(core)
    add(core, "bad", prompt)
    assert [refusal.request_id for refusal in run(core)[1]] == ["bad"]
    weights[BAD] = good
    add(core, "a", prompt)
    found, refusals = run(core)
    assert (found, refusals) == (expected, [])
    assert core.stats().prefix_hits == 0
    core.scheduler.check()


def test_what_is_still_on_its_way_after_the_last_request_does_not_keep_the_rows(
    tiny_gemma2_dir: Path,
) -> None:
    core = core_of(tiny_gemma2_dir)
    core._depth = 2
    add(core, "a", [8, 9, 10])
    core.step()
    core.abort("a")
    assert core.has_work, "a step is on its way"
    core.prompt_logits([8, 9, 10])
    assert not core.has_work
