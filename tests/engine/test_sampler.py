"""The sampler: greedy and its ties, the order of operations, and independence of the batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from cabochon.engine.messages import GenerateRequest
from cabochon.engine.request import Request
from cabochon.engine.rows import Rows
from cabochon.engine.sampler import Sampler
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.native.sampling import Slack

V = 40
PROMPT = [5, 6, 7]
OUTPUT = [9, 9, 5]


class Bench:
    """A sampler with rows whose requests have the prompt and output above."""

    def __init__(
        self, *params: SamplingParams, softcap: float | None = None, stop: frozenset[int] = frozenset()
    ) -> None:
        self.rows = Rows(max_seqs=max(1, len(params)), max_model_len=32, num_groups=1, page_tokens=4)
        self.sampler = Sampler(V, softcap)
        self.row_ids = []
        for index, each in enumerate(params):
            message = GenerateRequest(request_id=str(index), prompt_ids=PROMPT, params=each)
            request = Request(message, index, 8, stop, np.array(PROMPT, np.int32))
            request.row = self.rows.take([*PROMPT, *OUTPUT], len(PROMPT))
            self.sampler.set_row(request)
            self.row_ids.append(request.row)

    def sample(self, logits: torch.Tensor, exact: object = None, slack: Slack | None = None) -> list[int]:
        return self.sampler.sample(
            logits.clone(), np.array(self.row_ids, np.int32), self.rows, exact, slack
        ).token_ids.tolist()


def logits_of(*rows: dict[int, float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((len(rows), V), -3.0)
    for row, values in enumerate(rows):
        for token, value in values.items():
            out[row, token] = value
    return out.to(dtype)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, V), generator=torch.Generator().manual_seed(seed)) * 4


GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    assert Bench(GREEDY).sample(logits_of({30: 2.0, 11: 2.0, 12: 2.0}, dtype=dtype)) == [11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_torchs_max_gives_the_lowest_id_of_a_large_vocabulary(num_rows: int, dtype: torch.dtype) -> None:
    """What greedy rests on: torch does not document it."""
    logits = torch.zeros(num_rows, 262_144, dtype=dtype)
    logits[:, [200_000, 131_071, 262_143]] = 1
    assert logits.max(-1).indices.tolist() == [131_071] * num_rows
    assert [int(row.argmax()) for row in logits] == [131_071] * num_rows


def test_greedy_does_not_see_ties_that_the_cap_makes() -> None:
    capped = Bench(GREEDY, softcap=30.0)
    assert capped.sample(logits_of({3: 400.0, 20: 401.0})) == [20]  # 30 · tanh is 30 for both


def test_ties_of_bf16_are_settled_in_fp32() -> None:
    asked = []

    def exact(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        asked.append((rows.tolist(), ids.tolist()))
        return torch.tensor([0.1, 0.3, 0.3])

    bench = Bench(GREEDY, GREEDY)
    logits = logits_of({1: 5.0}, {3: 2.0, 8: 2.0, 9: 2.0}, dtype=torch.bfloat16)
    assert bench.sample(logits, exact) == [1, 8]
    assert asked == [([1, 1, 1], [3, 8, 9])]


def test_what_is_within_the_slack_is_settled_too() -> None:
    exact_of = {3: 2.0, 8: 2.004, 9: 2.1, 11: 1.0}

    def exact(_: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([exact_of[i] for i in ids.tolist()])

    def chosen(absolute: float, relative: float) -> list[int]:
        logits = logits_of({3: 2.0, 8: 1.9921875, 9: 1.5, 11: 1.0}, dtype=torch.bfloat16)
        return Bench(GREEDY).sample(logits, exact, Slack(torch.tensor([absolute]), relative))

    assert chosen(0.0, 0.0) == [3]
    assert chosen(0.005, 0.0) == [8]
    assert chosen(0.0, 0.002) == [8]
    assert chosen(0.125, 0.0625) == [9]


def test_an_infinite_logit_is_not_finite_with_slack_too() -> None:
    def never(_: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
        raise AssertionError("there is nothing to settle")

    bench = Bench(GREEDY)
    logits = logits_of({3: float("inf")}, dtype=torch.bfloat16)
    slack = Slack(torch.tensor([0.1]), 0.1)
    result = bench.sampler.sample(logits, np.array(bench.row_ids, np.int32), bench.rows, never, slack)
    assert not result.is_finite.any()


def test_bias_and_penalties_come_after_the_cap() -> None:
    bench = Bench(SamplingParams(temperature=0, logit_bias={20: 2.0}), softcap=30.0)
    assert bench.sample(logits_of({3: 400.0, 20: 60.0})) == [20]  # 30 against 28.9 + 2


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits = logits_of(
        {9: 5.0, 5: 4.8, 7: 4.6}
    )  # 9 twice in the output, 5 once (and in the prompt), 7 only prompt
    assert Bench(SamplingParams(temperature=0, presence_penalty=1.0)).sample(logits) == [7]
    assert Bench(SamplingParams(temperature=0, frequency_penalty=0.1)).sample(logits) == [9]
    assert Bench(SamplingParams(temperature=0, frequency_penalty=0.15)).sample(logits) == [
        9
    ]  # 4.7, 4.65, 4.6
    assert Bench(SamplingParams(temperature=0, frequency_penalty=0.25)).sample(logits) == [7]


def test_repetition_sees_the_prompt_too() -> None:
    logits = logits_of({7: 5.0, 20: 3.0})
    assert Bench(SamplingParams(temperature=0, repetition_penalty=2.0)).sample(logits) == [20]


def test_stop_tokens_are_banned_before_min_tokens() -> None:
    logits = logits_of({1: 9.0, 2: 8.0})
    stop = frozenset({1})
    assert Bench(SamplingParams(temperature=0, min_tokens=4), stop=stop).sample(logits) == [2]
    assert Bench(SamplingParams(temperature=0, min_tokens=3), stop=stop).sample(logits) == [1]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 3.0, "top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
        {"logit_bias": {3: 4.0, 4: -100.0}},
        {"presence_penalty": 2.0, "frequency_penalty": -1.0, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params: dict) -> None:
    logits = random_logits(1, seed=3) / 2
    expected = numpy_distribution(logits[0].double().numpy(), SamplingParams(**params), cap=30.0)
    draws = 4000
    drawn = np.zeros(V)
    for start in range(0, draws, 64):
        seeds = range(start, min(start + 64, draws))
        bench = Bench(*(SamplingParams(seed=seed, **params) for seed in seeds), softcap=30.0)
        drawn += np.bincount(bench.sample(logits.expand(len(seeds), V)), minlength=V)
    assert not drawn[expected == 0].any()
    likely = expected * draws >= 5
    rest = [drawn[~likely].sum()], [expected[~likely].sum() * draws]
    seen, wanted = drawn[likely], expected[likely] * draws
    if rest[1][0] >= 1:
        seen, wanted = np.concatenate([seen, rest[0]]), np.concatenate([wanted, rest[1]])
    if len(seen) > 1:
        assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-4


def numpy_distribution(logits: np.ndarray, params: SamplingParams, cap: float) -> np.ndarray:
    """The documented order of operations, spelled out on 40 tokens."""
    x = cap * np.tanh(logits / cap)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(PROMPT + OUTPUT):
        x[token] = (
            x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        )
    for token in set(OUTPUT):
        x[token] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token)
    x = x / params.temperature
    p = np.exp(x - x.max())
    order = np.argsort(-x, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.top_p < 1:
        p[order[int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1 :]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def test_a_rows_token_is_the_same_alone_and_among_63_others() -> None:
    kinds = [
        {"temperature": 0},
        {"temperature": 0.8},
        {"top_k": 7},
        {"top_p": 0.9, "min_p": 0.01},
        {"presence_penalty": 1.0, "logit_bias": {3: 1.0}},
    ]
    params = [SamplingParams(seed=i, **kinds[i % len(kinds)]) for i in range(64)]
    logits = random_logits(64)
    together = Bench(*params, softcap=30.0).sample(logits)
    alone = [Bench(p, softcap=30.0).sample(logits[i : i + 1])[0] for i, p in enumerate(params)]
    assert together == alone


def test_seeds_and_positions_change_the_draw() -> None:
    flat = torch.zeros(1, V)
    by_seed = {Bench(SamplingParams(seed=seed)).sample(flat)[0] for seed in range(30)}
    bench = Bench(SamplingParams(seed=1))
    by_position = set()
    for _ in range(20):
        by_position.add(bench.sample(flat)[0])
        bench.rows.num_tokens[0] += 1
    assert min(len(by_seed), len(by_position)) > 10
    assert Bench(SamplingParams(seed=1)).sample(flat) == Bench(SamplingParams(seed=1)).sample(flat)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    token = Bench(SamplingParams(temperature=temperature), softcap=30.0).sample(
        logits_of({3: 40.0, 4: 39.0})
    )[0]
    assert token == 3 or temperature > 1


@pytest.mark.parametrize("temperature", [9e-6, 1e-38, 1e-45, 1e-50, 5e-324])
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 1}, {"min_p": 0.5}], ids=str)
def test_a_temperature_too_small_for_fp32_is_greedy(temperature: float, fields: dict[str, float]) -> None:
    bench = Bench(SamplingParams(temperature=temperature, **fields))
    assert bench.sample(logits_of({0: 0.0, 2: 19.0, 3: 20.0})) == [3]
    assert bench.sample(logits_of({0: -9.0, 2: -2.0, 3: -1.0})) == [3]


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.1}], ids=str)
def test_the_smallest_sampled_temperature_takes_the_best(fields: dict[str, float]) -> None:
    bench = Bench(SamplingParams(temperature=1e-5, **fields))
    assert bench.sample(logits_of({0: 0.0, 2: 400.0, 3: 401.0})) == [3]


def test_a_row_that_comes_back_goes_on_as_if_it_had_stayed() -> None:
    params = SamplingParams(seed=4, frequency_penalty=0.5, repetition_penalty=1.3, min_tokens=5, top_p=0.9)
    logits = random_logits(1)
    stayed = Bench(params, stop=frozenset({3}))
    for _ in range(6):
        row = stayed.row_ids[0]
        stayed.rows.token_ids[row, stayed.rows.num_tokens[row]] = stayed.sample(logits)[0]
        stayed.rows.num_tokens[row] += 1
    known = stayed.rows.token_ids[row, : stayed.rows.num_tokens[row]].tolist()
    came_back = Bench(SamplingParams(), params, stop=frozenset({3}))  # another row, set anew
    came_back.row_ids = [came_back.row_ids[1]]
    came_back.rows.token_ids[came_back.row_ids[0], : len(known)] = known
    came_back.rows.num_tokens[came_back.row_ids[0]] = len(known)
    assert came_back.sample(logits) == stayed.sample(logits)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_flagged_and_the_others_go_on(bad: float) -> None:
    logits = random_logits(3)
    logits[1, 17] = bad
    bench = Bench(GREEDY, GREEDY, SamplingParams(seed=3))
    sampled = bench.sampler.sample(logits, np.array(bench.row_ids, np.int32), bench.rows)
    assert sampled.is_finite.tolist() == [True, False, True]
    assert sampled.token_ids[0] == logits[0].argmax()
