"""The sampling kernels against the CPU engine's sampler: the same rows, the same logits, the same tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from guarded import far_apart

from cabochon.engine.grammars import State
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.request import Request
from cabochon.engine.rows import Rows
from cabochon.engine.sampler import Sampler
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.sample import MAX_TIES, ExactLogits, SampleBuffers, SampleOutputs, Tiling, sample
from cabochon.kernels.sampling_state import RowSampling, SamplingState

TILING = Tiling(512, 16)
PROMPT = [5, 6, 7, 5, 70]
OUTPUT = [9, 9, 5]
STOP = frozenset({3, 70})
CAP = 30.0
GREEDY = SamplingParams(temperature=0)


class ReadyMatcher:
    """A grammar whose next mask is there."""

    state = State.READY

    def __init__(self, mask: np.ndarray) -> None:
        self._mask = mask

    def wait(self, _until_s: float) -> bool:
        return True

    def mask(self) -> np.ndarray:
        return self._mask.copy()


def row_sampling(request: Request) -> RowSampling:
    p = request.message.params
    return RowSampling(
        temperature=0.0 if p.is_greedy else p.temperature,
        top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, seed=p.seed, repetition=p.repetition_penalty,
        presence=p.presence_penalty, frequency=p.frequency_penalty, bias=p.logit_bias,
        min_tokens=p.min_tokens, stop_ids=request.stop_ids, has_grammar=request.matcher is not None,
        wants_logprobs=p.logprobs is not None,
    )  # fmt: skip


class World:
    """Both samplers over the same rows. Row i of the logits belongs to request i, in row `row_ids[i]`."""

    def __init__(
        self,
        *params: SamplingParams,
        V: int,
        softcap: float | None = None,
        masks: dict[int, np.ndarray] | None = None,
        tiling: Tiling = TILING,
        output: list[int] = OUTPUT,
    ) -> None:
        self.softcap = softcap
        self.rows = Rows(max_seqs=len(params) + 2, max_model_len=64, num_groups=1, page_tokens=4)
        self.rows.take([1], 1)  # so that row ids are not the rows' indices
        self.sampler = Sampler(V, softcap)
        self.state = SamplingState(
            max_seqs=len(params) + 2, vocab_size=V, max_entries=40, allocate=torch.device("cpu")
        )
        self.row_ids: list[int] = []
        for index, each in enumerate(params):
            message = GenerateRequest(request_id=str(index), prompt_ids=PROMPT, params=each)
            request = Request(message, index, 60, STOP, PROMPT)
            if masks and index in masks:
                request.matcher = ReadyMatcher(masks[index])  # type: ignore[assignment]
            request.row = self.rows.take([*PROMPT, *output], len(PROMPT))
            self.sampler.set_row(request)
            self.state.set_row(
                request.row, row_sampling(request), np.array(PROMPT), np.array(output, np.int64)
            )
            if request.matcher is not None:
                bits = np.zeros(-(-V // 32) * 32, np.bool_)
                bits[:V] = masks[index]
                packed = np.packbits(bits, bitorder="little").view(np.int32)
                self.state.allowed_bits[request.row] = torch.from_numpy(packed)
            self.row_ids.append(request.row)
        self.buffers = SampleBuffers(len(params) + 1, self.state, tiling)

    def kernel(
        self, logits: torch.Tensor, exact: ExactLogits | None = None, row_ids: list[int] | None = None
    ) -> SampleOutputs:
        ids = torch.tensor(self.row_ids if row_ids is None else row_ids, dtype=torch.int32)
        counts = torch.from_numpy(self.rows.num_tokens), torch.from_numpy(self.rows.num_prompt)
        return sample(logits, ids, self.state, *counts, self.softcap, self.buffers, exact)

    def engine(self, logits: torch.Tensor, exact: Any = None) -> Any:
        return self.sampler.sample(logits.clone(), np.array(self.row_ids, np.int32), self.rows, exact)

    def agree(self, logits: torch.Tensor) -> list[int]:
        ours, theirs = self.kernel(logits).token_ids.tolist(), self.engine(logits).token_ids.tolist()
        assert ours == theirs
        return ours


def noise(rows: int, V: int, seed: int = 0, gain: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * gain


@pytest.mark.parametrize("V", [1, 15, 511, 512, 513, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_largest_logit_and_of_equals_the_lowest_id(V: int, dtype: torch.dtype) -> None:
    if V < 80:  # the fixed prompt needs more tokens
        state = SamplingState(max_seqs=3, vocab_size=V, max_entries=10, allocate=torch.device("cpu"))
        for row in range(3):
            state.set_row(row, RowSampling(temperature=0.0))
        ones = torch.ones(3, dtype=torch.int32)
        logits = noise(3, V).round().to(dtype)
        ids = torch.arange(3, dtype=torch.int32)
        out = sample(logits, ids, state, ones, ones, CAP, SampleBuffers(3, state, TILING))
        assert out.token_ids.tolist() == logits.max(-1).indices.tolist()
    else:
        World(*[GREEDY] * 3, V=V, softcap=CAP).agree(noise(3, V).round().to(dtype))


def test_greedy_never_caps() -> None:
    logits = torch.full((1, 300), -3.0)
    logits[0, 100], logits[0, 20] = 401.0, 400.0  # 30 · tanh is 30 for both
    assert World(GREEDY, V=300, softcap=CAP).agree(logits) == [100]
    bound = SamplingParams(temperature=0, logit_bias={7: 1.0})
    assert World(bound, V=300, softcap=CAP).agree(logits) == [20]


@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_draws_are_the_engines(softcap: float | None, dtype: torch.dtype, temperature: float) -> None:
    seeds = [0, 1, 2**63 - 1, 12345]
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in seeds]
    World(*params, V=1000, softcap=softcap).agree(noise(4, 1000).to(dtype))


@pytest.mark.parametrize("spread", [4.0, 0.02])  # a flat row has its threshold below the head
@pytest.mark.parametrize(
    "truncation",
    [
        {"top_k": 1},
        {"top_k": 64, "top_p": 0.95},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 1400, "top_p": 0.5},
    ],
    ids=str,
)
def test_truncated_draws_are_the_engines(truncation: dict[str, Any], spread: float) -> None:
    params = [SamplingParams(temperature=0.7, seed=seed, **truncation) for seed in range(2)]
    logits = noise(2, 1500, gain=spread).bfloat16()
    world = World(*params, V=1500, softcap=CAP)
    tokens = world.agree(logits)
    if truncation == {"top_k": 1}:
        assert tokens == logits.max(-1).indices.tolist()


CONSTRAINED = [
    {"logit_bias": {4: 9.0, 900: 12.5, 70: -100.0}},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.4},
    {"presence_penalty": 2.0, "frequency_penalty": 1.5},
    {"presence_penalty": 0.2, "frequency_penalty": 0.45},
    {"presence_penalty": -2.0, "frequency_penalty": -1.0},
    {"min_tokens": 4},
    {"min_tokens": 3},
    {
        "logit_bias": {9: 5.0, 5: -3.0, 3: 7.0},
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "min_tokens": 9,
    },
]


@pytest.mark.parametrize("constraint", CONSTRAINED, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bias_penalties_and_min_tokens_are_the_engines(
    constraint: dict[str, Any], temperature: float
) -> None:
    params = [SamplingParams(temperature=temperature, seed=seed, **constraint) for seed in range(5)]
    concerned = [9, 5, 3, 70]
    logits = noise(5, 1000, gain=1)
    logits[:, concerned] = 8.0
    logits[range(4), concerned] = 9.0
    logits[4] = logits[0] - 20  # negative ones are penalized by a product
    tokens = World(*params, V=1000, softcap=CAP).agree(logits)
    free = [SamplingParams(temperature=temperature, seed=seed) for seed in range(5)]
    unbound = World(*free, V=1000, softcap=CAP).agree(logits)
    if constraint == {"min_tokens": 3}:  # three are behind
        assert tokens == unbound
    elif temperature == 0:
        assert tokens != unbound


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("extra", [{}, {"logit_bias": {8: 40.0, 9: 40.0}}, {"top_k": 3}, {"min_tokens": 8}])
def test_a_grammar_binds_what_is_chosen(temperature: float, extra: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    masks = {index: rng.random(1000) < 0.1 for index in range(3)}
    for mask in masks.values():
        mask[[3, 8, 9, 999]] = True, True, False, True
    params = [SamplingParams(temperature=temperature, seed=seed, **extra) for seed in range(3)]
    logits = noise(3, 1000)
    logits[:, 3] += 30
    logits[1, 999] += 60
    tokens = World(*params, V=1000, softcap=CAP, masks=masks).agree(logits)
    assert all(mask[token] for mask, token in zip(masks.values(), tokens, strict=True))


def test_a_grammar_without_a_next_token_gives_none() -> None:
    world = World(GREEDY, SamplingParams(), V=300, masks={0: np.zeros(300, bool), 1: np.zeros(300, bool)})
    out = world.kernel(noise(2, 300))
    assert out.token_ids.tolist() == [-1, -1]
    assert out.is_finite.tolist() == [True, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=5)], ids=["g", "s", "k"])
def test_a_row_that_is_not_finite_is_told_and_its_neighbours_are_served(
    bad: float, params: SamplingParams
) -> None:
    logits = noise(3, 600)
    logits[1, 599] = bad
    world = World(*[params] * 3, V=600, softcap=CAP)
    out, theirs = world.kernel(logits), world.engine(logits)
    assert out.is_finite.tolist() == theirs.is_finite.tolist() == [True, False, True]
    assert out.token_ids[1] == -1
    assert out.token_ids[[0, 2]].tolist() == theirs.token_ids[[0, 2]].tolist()


def test_a_row_of_minus_infinity_is_not_finite() -> None:
    world = World(GREEDY, GREEDY, V=300)
    logits = noise(2, 300)
    logits[0] = -torch.inf
    logits[1, 5:] = -torch.inf
    assert world.kernel(logits).is_finite.tolist() == [False, True]
    assert world.kernel(logits).token_ids.tolist() == [-1, int(logits[1].argmax())]


def test_padding_gets_no_token_and_reads_no_row() -> None:
    world = World(GREEDY, SamplingParams(), V=300)
    logits = torch.full((3, 300), torch.nan)
    logits[1] = noise(1, 300)[0]
    out = world.kernel(logits, row_ids=[-1, world.row_ids[0], -1])
    assert out.token_ids.tolist() == [-1, int(logits[1].argmax()), -1]
    assert out.is_finite.tolist() == [False, True, False]


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.8), SamplingParams(top_k=4)]
)
@pytest.mark.parametrize("softcap", [None, CAP])
def test_logprobs_are_the_engines(params: SamplingParams, softcap: float | None) -> None:
    asking = SamplingParams(
        temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, logprobs=0,
        logit_bias={3: 2.0}, repetition_penalty=1.5,
    )  # fmt: skip
    world = World(asking, GREEDY, asking, V=1000, softcap=softcap)
    logits = noise(3, 1000, gain=20)  # without a maximum exp would overflow
    out, theirs = world.kernel(logits), world.engine(logits)
    for index in (0, 2):
        expected = theirs.logprobs[world.row_ids[index]].logprob
        assert out.logprobs[index].item() == pytest.approx(expected, abs=2e-5)


def test_positions_past_the_vocabulary_have_no_share_of_the_logprobs() -> None:
    """Under the cap they would weigh as much as tokens of the lowest logit."""
    params = SamplingParams(temperature=0, logprobs=0)
    world = World(params, V=600, softcap=CAP)
    logits = noise(1, 600) - 300
    expected = world.engine(logits).logprobs[world.row_ids[0]].logprob
    assert world.kernel(logits).logprobs[0].item() == pytest.approx(expected, abs=2e-5)


def test_strided_logits_with_nan_around_them() -> None:
    world = World(GREEDY, SamplingParams(top_k=9), SamplingParams(), V=1000)
    logits = noise(3, 1000)
    memory = torch.full((3, 1100), torch.nan)
    memory[:, 40:1040] = logits
    assert world.kernel(memory[:, 40:1040]).token_ids.tolist() == world.engine(logits).token_ids.tolist()


def test_a_row_is_the_same_in_any_batch_and_under_any_tiling() -> None:
    params = [
        SamplingParams(seed=1), SamplingParams(seed=2, top_k=20, top_p=0.9), GREEDY,
        SamplingParams(seed=3, min_p=0.05, repetition_penalty=1.2, logprobs=0),
    ]  # fmt: skip
    logits = noise(4, 1000)
    world = World(*params, V=1000, softcap=CAP)
    whole = SampleOutputs(*(x.clone() for x in world.kernel(logits)))
    for index, row in enumerate(world.row_ids):
        alone = world.kernel(logits[index : index + 1], row_ids=[row])
        assert alone.token_ids[0] == whole.token_ids[index]
        if params[index].logprobs is not None:
            assert alone.logprobs[0] == whole.logprobs[index]
    for tiling in (Tiling(128, 8), Tiling(4096, 64)):
        other = World(*params, V=1000, softcap=CAP, tiling=tiling)
        assert other.kernel(logits).token_ids.tolist() == whole.token_ids.tolist()


def tied(V: int, E: int, tie_ids: list[int], values: list[float]) -> tuple[torch.Tensor, ExactLogits]:
    """bf16 logits with ties at the maximum, and the exact logits that settle them."""
    logits = torch.full((2, V), -5.0).bfloat16()
    head = torch.zeros(V, E, dtype=torch.bfloat16)
    logits[:, tie_ids] = 2.0
    head[tie_ids, E - 1] = torch.tensor(values).bfloat16()
    hidden = torch.zeros(2, E, dtype=torch.bfloat16)
    hidden[0, E - 1], hidden[1, E - 1] = 1.0, -1.0
    return logits, ExactLogits(hidden, head)


def test_ties_of_rounded_logits_are_settled_in_fp32() -> None:
    world = World(GREEDY, GREEDY, V=1000)
    logits, exact = tied(1000, 70, [17, 300, 301, 999], [2.0, 2.5, 2.5, 1.5])

    def engines(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (exact.hidden[rows].float() * exact.head[ids].float()).sum(-1)

    assert world.engine(logits, engines).token_ids.tolist() == [300, 999]
    assert world.kernel(logits, exact).token_ids.tolist() == [300, 999]
    assert world.kernel(logits).token_ids.tolist() == [17, 17]


def test_only_so_many_ties_are_settled() -> None:
    limit = MAX_TIES.value
    world = World(GREEDY, GREEDY, V=1000)
    ids = list(range(100, 100 + 3 * (limit + 1), 3))
    logits, exact = tied(1000, 8, ids, [1.0] * (limit - 1) + [2.0, 3.0])
    assert world.kernel(logits, exact).token_ids.tolist() == [ids[limit - 1], ids[0]]


def test_rows_pass_2_to_the_31() -> None:
    world = World(GREEDY, SamplingParams(top_k=5, seed=3), SamplingParams(seed=4), V=300)
    logits = far_apart(3, 300, torch.bfloat16)
    logits.copy_(noise(3, 300))
    assert world.kernel(logits).token_ids.tolist() == world.engine(logits).token_ids.tolist()


def test_shapes_that_disagree_are_told() -> None:
    world = World(GREEDY, V=300)
    with pytest.raises(ValueError, match=r"logits must be \[R, V\] = \[1, 300\] with contiguous rows"):
        world.kernel(torch.zeros(1, 299))
    with pytest.raises(ValueError, match="buffers hold 2 rows, got 3"):
        world.kernel(torch.zeros(3, 300), row_ids=[0, 1, 2])
