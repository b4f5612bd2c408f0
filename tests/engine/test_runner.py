"""From a plan to tokens: which rows enter the forward pass, which leave it, and logits in parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paged_world import prompt_of
from random_gemma import model_config, oracle_logits, random_gemma2, random_gemma3
from torch import Tensor

from cabochon.engine import runner as runner_module
from cabochon.engine.attention import AttentionInputs, TorchAttention
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.llm import LLM
from cabochon.engine.logprobs import ExactLogits
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.plan import Plan, StepResult
from cabochon.engine.rows import Rows
from cabochon.engine.runner import LOGITS_ROWS, Runner
from cabochon.engine.sampler import Sampler
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.native.sampling import Slack

P = 4
CONFIG = model_config(random_gemma2().config)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: two threads only wait for each other
    yield
    torch.set_num_threads(before)


class EchoModel:
    """Hidden rows are (token id, position); logits are the same two numbers."""

    config = CONFIG
    row_multiple = 4

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_logits: list[int] = []

    def hidden(self, token_ids: Tensor, inputs: AttentionInputs, *_: object) -> Tensor:
        self.token_ids = token_ids.tolist()
        positions = torch.full_like(token_ids, -1)
        positions[: len(inputs.positions)] = inputs.positions
        return torch.stack([token_ids, positions], dim=1).float()

    def logits(self, hidden: Tensor) -> Tensor:
        self.num_logits.append(len(hidden))
        return hidden

    def slack(self, _: Tensor) -> None:
        return None


class EchoSampler:
    """The token of a row is its position; NaN rows are not finite."""

    def prompt_logprobs(self, _: int) -> None:
        return None

    def draws(self, row_ids: np.ndarray, _: Rows) -> None:
        return None

    def sample(
        self, logits: Tensor, row_ids: np.ndarray, _: Rows, exact: ExactLogits | None, slack: Slack | None
    ) -> StepResult:
        assert len(logits) == len(row_ids)
        assert exact is slack is None, "fp32 logits have no ties of rounding"
        return StepResult(logits[:, 1].numpy().astype(np.int32), ~logits[:, 0].isnan().numpy())


def pages_of(config: ModelConfig, num_pages: int) -> KVPages:
    return KVPages(config, kv_layout(config, P, 4), num_pages, torch.float32, torch.device("cpu"))


def echo(max_seqs: int = 5) -> tuple[Runner, EchoModel, Rows]:
    model = EchoModel()
    rows = Rows(max_seqs=max_seqs, max_model_len=16, num_groups=2, page_tokens=P)
    rows.page_tables[:] = 1  # any page: the model does not look
    runner = Runner(model, TorchAttention(CONFIG, pages_of(CONFIG, 2)), EchoSampler())  # type: ignore[arg-type]
    rows.token_ids[:] = np.arange(max_seqs)[:, None] * 100 + np.arange(16)  # 207 stands in row 2 at 7
    return runner, model, rows


def plan_of(*work: tuple[int, int, int, bool], num_decodes: int = 0) -> Plan:
    """work: (row, start, len, samples)."""
    rows, starts, lens, samples = zip(*work, strict=True)
    ints = [np.array(column, np.int32) for column in (rows, starts, lens)]
    return Plan(*ints, np.array(samples, np.bool_), num_decodes)


MIXED = plan_of((3, 9, 1, True), (1, 4, 1, True), (0, 2, 3, False), (4, 0, 2, True), num_decodes=2)


def test_a_mixed_plan_computes_its_tokens_in_order_and_pads_to_four() -> None:
    runner, model, rows = echo()
    runner.sampling_hidden(MIXED, rows)
    assert model.token_ids == [309, 104, 2, 3, 4, 400, 401, 0]


def test_the_last_token_of_each_sampling_row_leaves() -> None:
    runner, _, rows = echo()
    assert runner.sampling_hidden(MIXED, rows).tolist() == [[309, 9], [104, 4], [401, 1]]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8])
def test_rows_of_the_forward_pass_are_a_multiple_of_four(length: int) -> None:
    runner, model, rows = echo()
    runner.sampling_hidden(plan_of((2, 0, length, True)), rows)
    assert model.token_ids[:length] == [200 + i for i in range(length)]
    assert len(model.token_ids) == -(-length // 4) * 4


class FourRowAdapters:
    """Adapters whose products need rows in fours, of a step that has none."""

    row_multiple = 4

    def step(self, *_: object) -> None:
        return None


@pytest.mark.parametrize(("has_adapters", "num_rows"), [(False, 5), (True, 8)])
def test_rows_are_padded_for_the_model_or_its_adapters(
    monkeypatch: pytest.MonkeyPatch, has_adapters: bool, num_rows: int
) -> None:
    monkeypatch.setattr(EchoModel, "row_multiple", 1)
    _, model, rows = echo()
    attention = TorchAttention(CONFIG, pages_of(CONFIG, 2))
    adapters = FourRowAdapters() if has_adapters else None
    runner = Runner(model, attention, EchoSampler(), adapters)  # type: ignore[arg-type]
    runner.sampling_hidden(plan_of((2, 0, 5, True)), rows)
    assert len(model.token_ids) == num_rows


def test_tokens_come_in_the_order_of_the_sampling_rows() -> None:
    runner, model, rows = echo()
    sampled = runner.run(MIXED, rows)
    assert sampled.token_ids.tolist() == [9, 4, 1]
    assert sampled.token_ids.dtype == np.int32
    assert sampled.is_finite.tolist() == [True, True, True]
    assert model.num_logits == [4]


def test_a_step_without_sampling_gives_no_tokens_and_no_logits() -> None:
    runner, model, rows = echo()
    sampled = runner.run(plan_of((0, 0, 5, False), (1, 0, 2, False)), rows)
    assert (sampled.token_ids.tolist(), sampled.is_finite.tolist()) == ([], [])
    assert model.num_logits == []


@pytest.mark.parametrize(
    ("num_rows", "parts"), [(63, [64]), (64, [64]), (65, [64, 4]), (130, [64, 64, 4]), (1, [4])]
)
def test_logits_are_made_for_at_most_64_rows_at_once(num_rows: int, parts: list[int]) -> None:
    runner, model, rows = echo(max_seqs=130)
    rows.num_tokens[:] = 1
    plan = plan_of(*((row, row % 11, 1, True) for row in range(num_rows)), num_decodes=num_rows)
    assert runner.run(plan, rows).token_ids.tolist() == [row % 11 for row in range(num_rows)]
    assert model.num_logits == parts


def test_rows_that_are_not_finite_are_flagged_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, model, rows = echo(max_seqs=70)
    bad = [0, 5, 63, 64, 69]

    def hidden(token_ids: Tensor, inputs: AttentionInputs, *_: object) -> Tensor:
        out = EchoModel.hidden(model, token_ids, inputs)
        out[bad, 0] = torch.nan
        return out

    monkeypatch.setattr(model, "hidden", hidden)
    sampled = runner.run(plan_of(*((row, 0, 1, True) for row in range(70)), num_decodes=70), rows)
    assert np.flatnonzero(~sampled.is_finite).tolist() == bad


@pytest.mark.parametrize("length", [1, 6, 8])
@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
def test_last_logits_are_softcapped_where_the_model_is(make: type, length: int) -> None:
    hf = make()
    config, weights = model_config(hf.config), dict(hf.state_dict())
    model = Gemma(config, lambda name, shape: weights[name].view(shape), 16)
    num_groups = kv_layout(config, P, 4).num_groups
    rows = Rows(max_seqs=2, max_model_len=16, num_groups=num_groups, page_tokens=P)
    attention = TorchAttention(config, pages_of(config, 4 * num_groups))
    runner = Runner(model, attention, Sampler(config.vocab_size, config.final_softcap))
    ids = prompt_of(length)
    row = rows.take(ids, length)
    rows.page_tables[:, row] = 1 + np.arange(4 * num_groups).reshape(num_groups, 4)
    logits = runner.last_logits(row, rows)
    torch.testing.assert_close(logits, oracle_logits(hf, ids)[-1], atol=1e-4, rtol=0)
    assert logits.dtype == torch.float32
    assert rows.num_computed[row] == 0


KINDS = [{"temperature": 0}, {}, {"top_p": 0.8}, {"top_k": 5, "presence_penalty": 1.0}, {"min_p": 0.1}]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("at_once", [1, 7, 16, 128])
def test_more_sampling_rows_than_logits_at_once_give_the_same_tokens(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, at_once: int
) -> None:
    llm = LLM(str(tiny_gemma2_dir), dtype=dtype, max_seqs=80, step_tokens=512, kv_cache_gib=0.02, threads=1,
              prefix_caching=False)  # fmt: skip
    prompts = [prompt_of(1 + i % 5, seed=i) for i in range(75)]
    params = [
        SamplingParams(seed=i, max_tokens=3, ignore_eos=True, **KINDS[i % len(KINDS)]) for i in range(75)
    ]
    assert len(prompts) > LOGITS_ROWS
    expected = [completion.token_ids for completion in llm.generate(prompts, params)]
    monkeypatch.setattr(runner_module, "LOGITS_ROWS", at_once)
    assert [completion.token_ids for completion in llm.generate(prompts, params)] == expected


@pytest.mark.parametrize(("dtype", "is_asked"), [("fp32", False), ("bf16", True)])
def test_exact_logits_are_offered_where_logits_are_rounded(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, is_asked: bool
) -> None:
    llm = LLM(str(tiny_gemma2_dir), dtype=dtype, kv_cache_gib=0.02, threads=1)
    offered: list[ExactLogits | None] = []
    sample = Sampler.sample

    def spy(self: Sampler, *args: Any) -> StepResult:
        offered.append(args[3])
        return sample(self, *args)

    monkeypatch.setattr(Sampler, "sample", spy)
    llm.generate([[9, 10]], SamplingParams(seed=1, top_k=5, max_tokens=2))
    assert [exact is not None for exact in offered] == [is_asked] * len(offered)
    assert offered
