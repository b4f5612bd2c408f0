"""The runner of GPUs in Triton's interpreter, on a stream that does its work as late as it can."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_world import DeviceEngine, greedy, prompt, run_core, tokens
from tokenizers import Tokenizer

from cabochon.engine.config import EngineConfig
from cabochon.engine.decode_graphs import graph_sizes
from cabochon.engine.device_runner import DeviceRunner
from cabochon.engine.load import load_engine
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import Grammar, SamplingParams

pytestmark = pytest.mark.usefixtures("triton_interpreter")


MIXED = {
    "a": (prompt(3), greedy(7)),
    "b": (prompt(21, 1), greedy(5)),
    "sampled": (prompt(5, 2), SamplingParams(temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)),
    "nucleus": (prompt(4, 3), SamplingParams(temperature=0.9, top_p=0.8, top_k=20, seed=6, max_tokens=5)),
    "penalized": (prompt(6, 4), greedy(6, repetition_penalty=1.3, presence_penalty=0.5)),
    "biased": (prompt(2, 5), greedy(4, logit_bias={17: 40.0}, min_tokens=3)),
}


@pytest.fixture(scope="module")
def oracle(small_gemma2_dir: Path) -> dict[str, list[int]]:
    """By the torch backend, a step at a time, on the host's rows and sampler."""
    config = EngineConfig(
        model="tiny", dtype="fp32", page_tokens=4, max_seqs=8, step_tokens=16, kv_cache_gib=0.01, threads=1,
        attention_backend="torch",
    )  # fmt: skip
    core, _ = load_engine(config, small_gemma2_dir)
    return tokens(run_core(core, MIXED))


@pytest.mark.parametrize(("depth", "has_graphs"), [(1, False), (2, False), (2, True)])
def test_any_depth_with_graphs_or_without_gives_the_tokens_of_the_host_runner(
    small_gemma2_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    oracle: dict[str, list[int]],
    depth: int,
    has_graphs: bool,
) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch, step_depth=depth, has_graphs=has_graphs)
    assert tokens(engine.run(MIXED)) == oracle
    assert engine.stream.most_waiting == depth
    assert (engine.replays > 2) == has_graphs
    assert engine.core.stats().pages_used == 0


def test_aborts_in_flight_and_rows_that_change_hands_disturb_nobody(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, oracle: dict[str, list[int]]
) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch, max_seqs=3)
    found = tokens(engine.run(MIXED, at_step={3: "a", 5: "b"}))
    for name, expected in oracle.items():
        if name in ("a", "b"):
            assert found[name] == expected[: len(found[name])]
            assert len(found[name]) < len(expected)
        else:
            assert found[name] == expected
    assert engine.core.stats().pages_used == 0


def test_a_pool_that_is_too_small_preempts_in_flight_and_changes_no_token(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {f"{i}": (prompt(6, i), greedy(10)) for i in range(3)}
    roomy = DeviceEngine(small_gemma2_dir, monkeypatch)
    page_gib = roomy.info.kv_bytes / (roomy.info.num_pages + 1) / 2**30
    tight = DeviceEngine(small_gemma2_dir, monkeypatch, kv_cache_gib=page_gib * 12.5, max_model_len=16)
    assert tokens(tight.run(wanted)) == tokens(roomy.run(wanted))
    assert tight.core.stats().preemptions > 0
    assert roomy.core.stats().preemptions == 0


def test_a_stop_token_in_flight_ends_its_request_there(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, oracle: dict[str, list[int]]
) -> None:
    ids, expected = MIXED["sampled"][0], oracle["sampled"]
    stop = expected[2]
    assert stop not in expected[:2]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=6, ignore_eos=True, stop_token_ids=(stop,))
    engine = DeviceEngine(small_gemma2_dir, monkeypatch)
    outputs = engine.run({"sampled": (ids, params), "b": MIXED["b"]})
    assert tokens(outputs) == {"sampled": expected[:3], "b": oracle["b"]}
    assert outputs["sampled"][-1].finish_reason == "stop"


def test_log_probabilities_of_prompt_and_output_are_those_of_the_host_runner(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        "both": (prompt(19, 1), greedy(3, logprobs=3, prompt_logprobs=2)),
        "prompt": (prompt(1, 4), greedy(3, prompt_logprobs=2)),  # one token: as short as a decode
        "own": (prompt(4, 2), SamplingParams(temperature=1.0, seed=3, max_tokens=3, logprobs=0)),
        "none": (prompt(4, 3), greedy(3)),
    }
    engine = DeviceEngine(small_gemma2_dir, monkeypatch)
    config = EngineConfig(
        model="tiny", dtype="fp32", page_tokens=4, max_seqs=8, step_tokens=16, kv_cache_gib=0.01, threads=1,
        attention_backend="torch",
    )  # fmt: skip
    host, _ = load_engine(config, small_gemma2_dir)
    ours, theirs = engine.run(wanted), run_core(host, wanted)
    assert tokens(ours) == tokens(theirs)
    for name in wanted:
        for a, b in zip(ours[name], theirs[name], strict=True):
            for mine, expected in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
                assert (mine is None) == (expected is None)
                for one, other in zip(mine or [], expected or [], strict=True):
                    assert one.top_ids == other.top_ids
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                    assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def test_a_grammar_binds_its_row_a_step_at_a_time_and_the_others_run_on(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, oracle: dict[str, list[int]]
) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch)
    bound = greedy(12, grammar=Grammar(kind="regex", text="(yes|no)!"))
    found = tokens(engine.run({"a": MIXED["a"], "bound": (prompt(3, 9), bound), "b": MIXED["b"]}))
    text = engine_text(small_gemma2_dir, found.pop("bound"))
    assert text in ("yes!", "no!")
    assert found == {"a": oracle["a"], "b": oracle["b"]}


def engine_text(directory: Path, ids: list[int]) -> str:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return str(tokenizer.decode(ids))


def test_a_nan_ends_its_request_alone(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, oracle: dict[str, list[int]]
) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch)
    engine.core._runner._model._embedding[5] = torch.nan  # type: ignore[attr-defined]
    for name, (ids, params) in {"a": MIXED["a"], "bad": ([7, 5, 8], greedy(5))}.items():
        engine.core.add(GenerateRequest(request_id=name, prompt_ids=ids, params=params))
    found: list[int] = []
    refused = []
    while engine.core.has_work:
        outputs, refusals = engine.core.step()
        refused += [refusal.request_id for refusal in refusals]
        for output in outputs:
            assert output.request_id == "a"
            found += output.token_ids
    assert refused == ["bad"]
    assert found == oracle["a"]


def test_the_logits_that_verify_compares_are_those_of_the_host_runner(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch)
    engine.run({"a": MIXED["a"]})  # its row is used again
    config = EngineConfig(
        model="tiny", dtype="fp32", page_tokens=4, kv_cache_gib=0.01, threads=1, attention_backend="torch"
    )
    host, _ = load_engine(config, small_gemma2_dir)
    close = (engine.core.prompt_logits(prompt(11)) - host.prompt_logits(prompt(11))).abs().max()
    assert close < 1e-4


def test_a_graph_keeps_what_it_reads_alive(small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch, has_graphs=False)
    runner = engine.core._runner
    assert isinstance(runner, DeviceRunner)

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        engine._capture(work)
        return lambda: None  # a graph holds addresses, not objects

    runner.add_graphs([4], capture)
    assert not engine.core.get_ready()
    gc.collect()
    assert len(engine.graph_inputs) == 5
    assert all(ref() is not None for ref in engine.graph_inputs)


def test_an_interrupt_while_a_step_is_awaited_leaves_a_core_that_goes_on(
    small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, oracle: dict[str, list[int]]
) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch)
    prompt_ids, params = MIXED["a"]
    engine.core.add(GenerateRequest(request_id="old", prompt_ids=prompt_ids, params=params))
    engine.core.step()
    work = engine.stream.queue[0]

    def interrupted() -> None:
        engine.stream.queue.appendleft(work)
        raise KeyboardInterrupt

    engine.stream.queue[0] = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.core.step()
    engine.core.abort("old")
    assert tokens(engine.run({"a": MIXED["a"]})) == {"a": oracle["a"]}


def test_graph_sizes_hold_every_number_of_rows_with_little_padding() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 4]
    assert graph_sizes(64)[-1] == 64
    assert graph_sizes(65)[-2:] == [64, 80]
    assert graph_sizes(1000)[-1] == 256
    sizes = graph_sizes(256)
    for rows in range(1, 257):
        assert min(size for size in sizes if size >= rows) < max(rows + 16, 2 * rows)
