"""Rows' sampling state on the device: entries at admission, counts as tokens come, against the CPU engine."""

import math

import numpy as np
import pytest
import torch

from cabochon.engine.messages import GenerateRequest
from cabochon.engine.request import Request
from cabochon.engine.rows import Rows
from cabochon.engine.sampler import Sampler
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.prepare_inputs import append_tokens
from cabochon.kernels.sample import SampleBuffers, Tiling, sample
from cabochon.kernels.sampling_state import (
    BLOCK_ENTRIES,
    BOUND,
    GRAMMAR,
    GREEDY,
    LOGPROBS,
    PENALTIES,
    SEEN,
    STOP,
    TRUNCATED,
    RowSampling,
    SamplingState,
    note_tokens,
)

V = 100


def state(max_entries: int = 16, vocab_size: int = V) -> SamplingState:
    return SamplingState(
        max_seqs=3, vocab_size=vocab_size, max_entries=max_entries, allocate=torch.device("cpu")
    )


def entries(of: SamplingState, row: int) -> dict[int, tuple[float, int, int]]:
    """Token id -> bias, count in the output, marks."""
    num = int(of.num_entries[row])
    columns = (of.entry_ids, of.entry_bias, of.entry_counts, of.entry_marks)
    return {i: (b, c, m) for i, b, c, m in zip(*(x[row, :num].tolist() for x in columns), strict=True)}


def bits(of: SamplingState, row: int) -> set[int]:
    unpacked = np.unpackbits(of.entry_bits[row].numpy().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(unpacked).tolist())


def noted(of: SamplingState, rows: list[int], tokens: list[int]) -> None:
    note_tokens(torch.tensor(rows, dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32), of)


@pytest.mark.parametrize(
    ("sampling", "flags"),
    [
        (RowSampling(), 0),
        (RowSampling(temperature=0.0), GREEDY.value),
        (RowSampling(temperature=0.0, top_k=5, top_p=0.5), GREEDY.value),
        (RowSampling(top_k=5), TRUNCATED.value),
        (RowSampling(top_k=V), 0),
        (RowSampling(top_p=0.99), TRUNCATED.value),
        (RowSampling(min_p=0.1), TRUNCATED.value),
        (RowSampling(bias={3: 1.0}), BOUND.value),
        (RowSampling(presence=0.1), BOUND.value | PENALTIES.value),
        (RowSampling(repetition=1.1), BOUND.value | PENALTIES.value),
        (RowSampling(has_grammar=True, wants_logprobs=True), GRAMMAR.value | LOGPROBS.value),
    ],
    ids=str,
)
def test_flags_are_what_the_parameters_ask_for(sampling: RowSampling, flags: int) -> None:
    assert sampling.flags(V) == flags


def test_a_row_lists_biased_seen_and_stop_tokens_once_each() -> None:
    s = state()
    sampling = RowSampling(bias={7: 2.5, 40: -1.0}, frequency=0.5, min_tokens=2, stop_ids={1, 40})
    s.set_row(1, sampling, np.array([7, 8, 8]), np.array([9, 8, 9, 9]))
    assert entries(s, 1) == {
        1: (0.0, 0, STOP.value),
        7: (2.5, 0, SEEN.value),
        8: (0.0, 1, SEEN.value),
        9: (0.0, 3, SEEN.value),
        40: (-1.0, 0, STOP.value),
    }
    assert bits(s, 1) == {1, 7, 8, 9, 40}
    assert not entries(s, 0)
    assert not bits(s, 2)


def test_a_row_without_need_lists_nothing_and_a_new_request_clears_the_old() -> None:
    s = state()
    s.set_row(0, RowSampling(presence=1.0, min_p=0.5, seed=2**63 - 1), np.array([3, 4]))
    assert s.doubles[0].tolist() == [1.0, math.log(0.5)]
    assert s.seeds[0].item() == 2**63 - 1
    s.set_row(0, RowSampling(stop_ids={1}), np.array([3, 4]), np.array([5]))
    assert not entries(s, 0)
    assert not bits(s, 0)
    assert s.doubles[0].tolist() == [1.0, -math.inf]


def test_new_tokens_are_counted_and_listed() -> None:
    s = state()
    for row in range(2):
        s.set_row(row, RowSampling(repetition=1.5, bias={50: 1.0}), np.array([7, 8]))
    noted(s, [0, 1], [8, 99])
    noted(s, [1, 0], [99, 50])
    assert entries(s, 0) == {7: (0.0, 0, 1), 8: (0.0, 1, 1), 50: (1.0, 1, 1)}
    assert entries(s, 1) == {7: (0.0, 0, 1), 8: (0.0, 0, 1), 50: (1.0, 0, 0), 99: (0.0, 2, 1)}
    assert bits(s, 1) == {7, 8, 50, 99}


def test_bit_31_of_a_word_is_set_like_the_others() -> None:
    s = state()
    s.set_row(0, RowSampling(presence=1.0))
    noted(s, [0], [31])
    noted(s, [0], [63])
    noted(s, [0], [32])
    assert bits(s, 0) == {31, 32, 63}


def test_rows_without_penalties_and_missing_tokens_are_not_counted() -> None:
    s = state()
    s.set_row(0, RowSampling(bias={3: 1.0}))
    s.set_row(1, RowSampling(presence=1.0))
    noted(s, [0, -1, 1], [3, 4, -1])
    assert entries(s, 0) == {3: (1.0, 0, 0)}
    assert not entries(s, 1)


def test_a_full_list_takes_no_more() -> None:
    s = state(max_entries=2)
    s.set_row(1, RowSampling(presence=1.0), np.array([7, 8]))
    noted(s, [1], [9])
    noted(s, [1], [8])
    assert entries(s, 1) == {7: (0.0, 0, 1), 8: (0.0, 1, 1)}
    assert not s.entry_ids[2].any()


def test_a_long_list_is_searched_to_its_end() -> None:
    s = state(max_entries=3000, vocab_size=5000)
    s.set_row(0, RowSampling(presence=1.0), np.arange(0, 2 * BLOCK_ENTRIES + 2, 1))
    noted(s, [0], [2 * BLOCK_ENTRIES + 1])
    noted(s, [0], [4999])
    found = entries(s, 0)
    assert len(found) == 2 * BLOCK_ENTRIES + 3
    assert found[2 * BLOCK_ENTRIES + 1] == (0.0, 1, 1)
    assert found[4999] == (0.0, 1, 1)


def test_too_many_tokens_are_told() -> None:
    with pytest.raises(ValueError, match="a row may have 2 tokens of its own, got 3"):
        state(max_entries=2).set_row(0, RowSampling(presence=1.0), np.array([1, 2, 3]))


def test_steps_on_the_device_are_steps_of_the_cpu_engine() -> None:
    """Penalties of a history that only the device keeps."""
    params = [
        SamplingParams(temperature=0, repetition_penalty=1.8, min_tokens=4),
        SamplingParams(seed=1, frequency_penalty=1.5, presence_penalty=0.5, logit_bias={11: 3.0}),
        SamplingParams(seed=2, top_k=8, repetition_penalty=1.3),
    ]
    prompt = [5, 6, 7, 5]
    rows = Rows(max_seqs=3, max_model_len=32, num_groups=1, page_tokens=4)
    sampler, s = Sampler(V, 30.0), state(max_entries=V)
    for index, p in enumerate(params):
        message = GenerateRequest(request_id=str(index), prompt_ids=prompt, params=p)
        request = Request(message, index, 20, frozenset({3}), prompt)
        request.row = rows.take(prompt, len(prompt))
        assert request.row == index
        sampler.set_row(request)
        s.set_row(
            index,
            RowSampling(
                temperature=p.temperature, top_k=p.top_k, seed=p.seed, repetition=p.repetition_penalty,
                presence=p.presence_penalty, frequency=p.frequency_penalty, bias=p.logit_bias,
                min_tokens=p.min_tokens, stop_ids=request.stop_ids,
            ),
            np.array(prompt),
        )  # fmt: skip
    row_ids = torch.arange(3, dtype=torch.int32)
    token_ids, num_tokens = torch.from_numpy(rows.token_ids.copy()), torch.from_numpy(rows.num_tokens.copy())
    num_prompt, buffers = torch.from_numpy(rows.num_prompt), SampleBuffers(3, s, Tiling(64, 4))
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, 3] = 6
    for _ in range(6):
        ours = sample(logits, row_ids, s, num_tokens, num_prompt, 30.0, buffers).token_ids
        theirs = sampler.sample(logits.clone(), row_ids.numpy(), rows).token_ids
        assert ours.tolist() == theirs.tolist()
        note_tokens(row_ids, ours, s)
        append_tokens(row_ids, ours, token_ids, num_tokens)
        rows.token_ids[np.arange(3), rows.num_tokens] = theirs
        rows.num_tokens += 1
    assert (token_ids.numpy() == rows.token_ids).all()
    assert len(set(token_ids[0, 4:10].tolist())) > 3
