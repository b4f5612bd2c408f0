"""Arrivals and workloads are what they claim: statistics with fixed seeds."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from load import arrivals, workloads
from scipy import stats


def gaps(times: arrivals.Gaps, count: int) -> np.ndarray:
    return np.diff([0.0, *itertools.islice(times, count)])


def test_poisson_gaps_are_exponential_and_independent() -> None:
    found = gaps(arrivals.poisson(4.0, np.random.default_rng(0)), 5000)
    assert stats.kstest(found, "expon", args=(0, 0.25)).pvalue > 0.01
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.04


def test_a_poisson_process_counts_with_its_mean_as_variance() -> None:
    times = np.array(arrivals.until(arrivals.poisson(5.0, np.random.default_rng(1)), 2000.0))
    counts = np.bincount(times.astype(int), minlength=2000)
    assert counts.mean() == pytest.approx(5, rel=0.03)
    assert counts.var() == pytest.approx(5, rel=0.08)


@pytest.mark.parametrize("cv", [0.5, 3.0])
def test_bursty_gaps_have_the_rate_and_the_spread_that_were_asked_for(cv: float) -> None:
    found = gaps(arrivals.bursty(2.0, cv, np.random.default_rng(2)), 40_000)
    assert found.mean() == pytest.approx(0.5, rel=0.05)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.05)


def test_equal_seeds_give_equal_times_and_requests() -> None:
    def drawn(seed: int) -> object:
        rng = np.random.default_rng(seed)
        asker = workloads.Asker(model="m")
        times = arrivals.until(arrivals.poisson(3.0, rng), 5.0)
        return times, [workloads.encode(workloads.sharegpt(asker)(rng)) for _ in range(5)]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_periodic_arrivals_begin_after_half_a_period() -> None:
    assert arrivals.until(arrivals.every(2.0), 7.0) == [1.0, 3.0, 5.0]


def test_a_trace_is_read_in_mooncakes_keys_and_in_ours(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 500, "input_length": 10, "output_length": 2, "hash_ids": [1]},
            {"at_s": 3.0, "prompt_tokens": 20, "output_tokens": 4}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    assert arrivals.read_trace(path) == [(0.5, 10, 2), (3.0, 20, 4)]
    assert arrivals.read_trace(path, speed=2.0) == [(0.25, 10, 2), (1.5, 20, 4)]


@pytest.mark.parametrize(
    "line", ['{"timestamp": 1}', "[1, 2, 3]", "no JSON", '{"at_s": 0, "prompt_tokens": 1}']
)
def test_a_broken_trace_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at_s": 1, "prompt_tokens": 1, "output_tokens": 1}\n' + line)
    with pytest.raises(ValueError, match="line 2 has not: correct it"):
        arrivals.read_trace(path)


def test_a_trace_that_goes_back_in_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    one = {"prompt_tokens": 1, "output_tokens": 1}
    path.write_text("\n".join(json.dumps({"at_s": at_s, **one}) for at_s in (2, 1)))
    with pytest.raises(ValueError, match="line 2 is earlier: sort it"):
        arrivals.read_trace(path)


def test_sharegpt_lengths_have_the_published_means() -> None:
    rng = np.random.default_rng(3)
    prompts, outputs = np.array([workloads.sharegpt_lengths(rng) for _ in range(20_000)]).T
    assert prompts.mean() == pytest.approx(workloads.SHAREGPT_PROMPT_MEAN, rel=0.05)
    assert outputs.mean() == pytest.approx(workloads.SHAREGPT_OUTPUT_MEAN, rel=0.03)
    median = workloads.SHAREGPT_PROMPT_MEAN / math.exp(workloads.SIGMA**2 / 2)
    assert np.median(prompts) == pytest.approx(median, rel=0.03)  # a long tail: the mean is far above it
    assert max(prompts.max(), outputs.max()) == workloads.LONGEST


def test_prompts_of_ids_are_exact_and_never_repeat() -> None:
    rng = np.random.default_rng(4)
    draw = workloads.fixed(workloads.Asker(model="m", top_id=5000), 16, 3)
    first, second = draw(rng).body, draw(rng).body
    assert len(first["prompt"]) == len(second["prompt"]) == 16
    assert first["prompt"] != second["prompt"]
    assert all(1000 <= token < 5000 for token in first["prompt"] + second["prompt"])
    assert (first["max_tokens"], first["ignore_eos"], first["stream"]) == (3, True, True)


def test_chats_share_few_beginnings_and_differ_after_them() -> None:
    rng = np.random.default_rng(5)
    draw = workloads.shared_prefix(workloads.Asker(model="m"), 2, 30, 10, 4)
    texts = [draw(rng).body["messages"][0]["content"] for _ in range(40)]
    heads = {text.partition("\n\n")[0] for text in texts}
    assert len(heads) == 2
    assert all(len(head.split()) == 30 for head in heads)
    assert len(set(texts)) == 40


def test_servers_without_ids_or_ignore_eos_get_words_and_no_option_of_ours() -> None:
    asker = workloads.Asker(model="m", has_ids=False, ignores_eos=False)
    body = workloads.fixed(asker, 12, 5)(np.random.default_rng(6)).body
    assert len(body["prompt"].split()) == 12
    assert "ignore_eos" not in body
