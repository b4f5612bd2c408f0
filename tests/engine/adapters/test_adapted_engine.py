"""Engines with adapters: tokens and log probabilities of mixed batches are those of transformers and peft."""

import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from adapted_gemma import RANKS, AdaptedGemma
from device_world import DeviceEngine, greedy, prompt, run_core, tokens
from random_gemma import random_gemma2, random_gemma3
from tiny_tokenizer import tiny_tokenizer

from cabochon.engine.adapters.triton_deltas import TritonAdapterWeights
from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.device_runner import DeviceRunner
from cabochon.engine.errors import BadAdapter, UnknownAdapter
from cabochon.engine.llm import LLM
from cabochon.engine.load import load_engine
from cabochon.engine.messages import GenerateRequest, LoadAdapter, UnloadAdapter
from cabochon.engine.sampling_params import Grammar, SamplingParams

NAMES = [*RANKS, None]


@pytest.fixture(scope="module")
def small(small_gemma2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AdaptedGemma:
    """The model of small_gemma2_dir."""
    size, ids = tiny_tokenizer().get_vocab_size(), {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    return AdaptedGemma(
        lambda: random_gemma2(vocab_size=size, num_hidden_layers=2, **ids),
        tmp_path_factory.mktemp("adapters"),
    )


@pytest.fixture(scope="module")
def tiny3(tmp_path_factory: pytest.TempPathFactory) -> AdaptedGemma:
    """The model of tiny_gemma3_dir."""
    size, ids = tiny_tokenizer().get_vocab_size(), {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    return AdaptedGemma(lambda: random_gemma3(vocab_size=size, **ids), tmp_path_factory.mktemp("adapters"))


def modules(gemma: AdaptedGemma) -> tuple[str, ...]:
    return tuple(f"{name}={path}" for name, path in gemma.paths.items())


def core_of(gemma: AdaptedGemma, directory: Path, **options: object) -> EngineCore:
    defaults = {
        "model": "tiny", "dtype": "fp32", "page_tokens": 4, "max_seqs": 8, "step_tokens": 16,
        "kv_cache_gib": 0.01, "threads": 1, "lora_modules": modules(gemma),
    }  # fmt: skip
    core, _ = load_engine(EngineConfig(**{**defaults, **options}), directory)
    return core


def prompts_of(seed: int = 0) -> dict[str | None, list[int]]:
    """All begin alike: only the adapter keeps their pages apart."""
    return {name: [*prompt(13, seed), *prompt(index + 1, index)] for index, name in enumerate(NAMES)}


def mixed(
    core: EngineCore, seed: int = 0, num_tokens: int = 6, **fields: object
) -> dict[str | None, list[int]]:
    wanted = {str(name): (ids, greedy(num_tokens, **fields)) for name, ids in prompts_of(seed).items()}
    found = tokens(run_core(core, wanted, adapters={str(name): name for name in NAMES}))
    return {name: found[str(name)] for name in NAMES}


@pytest.mark.parametrize("max_loras", [1, 2, 8])
@pytest.mark.parametrize("step_tokens", [8, 64])
def test_greedy_tokens_of_a_mixed_batch(
    small: AdaptedGemma, small_gemma2_dir: Path, max_loras: int, step_tokens: int
) -> None:
    core = core_of(small, small_gemma2_dir, max_loras=max_loras, step_tokens=step_tokens)
    expected = {name: small.greedy(name, ids, 6) for name, ids in prompts_of().items()}
    assert len(set(map(tuple, expected.values()))) == len(NAMES)
    assert mixed(core) == expected
    assert core.stats().prefix_hits == 0, "adapters share pages"
    assert mixed(core) == expected
    assert core.stats().prefix_hits >= len(NAMES) * 12, "a second time nothing was found"


def test_greedy_tokens_of_gemma_3(tiny3: AdaptedGemma, tiny_gemma3_dir: Path) -> None:
    core = core_of(tiny3, tiny_gemma3_dir)
    assert mixed(core) == {name: tiny3.greedy(name, ids, 6) for name, ids in prompts_of().items()}


def test_log_probabilities_are_the_oracles(small: AdaptedGemma, small_gemma2_dir: Path) -> None:
    core = core_of(small, small_gemma2_dir)
    wanted = {
        str(name): (ids, greedy(1, logprobs=3, prompt_logprobs=0)) for name, ids in prompts_of().items()
    }
    found = run_core(core, wanted, adapters={str(name): name for name in NAMES})
    for name, ids in prompts_of().items():
        logprobs = small.logits(name, ids).log_softmax(-1)
        (output,) = found[str(name)]
        assert output.logprobs is not None
        assert output.prompt_logprobs is not None
        top = logprobs[-1].topk(3)
        assert output.logprobs[0].top_ids == top.indices.tolist()
        assert output.logprobs[0].top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
        of_prompt = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        assert [one.logprob for one in output.prompt_logprobs] == pytest.approx(of_prompt, abs=1e-4)


def test_a_pool_that_is_too_small_preempts_and_changes_no_token(
    small: AdaptedGemma, small_gemma2_dir: Path
) -> None:
    roomy = core_of(small, small_gemma2_dir)
    page_gib = roomy._runner._attention._pages.layout.page_bytes / 2**30  # type: ignore[attr-defined]
    tight = core_of(small, small_gemma2_dir, kv_cache_gib=page_gib * 26.5, max_model_len=32, max_loras=2)
    assert mixed(tight, num_tokens=12) == mixed(roomy, num_tokens=12)
    assert tight.stats().preemptions > 0


def test_a_grammar_binds_the_output_of_an_adapter(small: AdaptedGemma, small_gemma2_dir: Path) -> None:
    llm = LLM(str(small_gemma2_dir), dtype="fp32", kv_cache_gib=0.01, threads=1, lora_modules=modules(small))
    params = SamplingParams(temperature=0, max_tokens=12, grammar=Grammar(kind="regex", text="(yes|no)!"))
    for one in llm.generate([prompt(4)] * 4, params, adapter=NAMES):
        assert one.text in ("yes!", "no!")


Found = dict[str, list[int]]


def load(
    core: EngineCore, name: str, path: Path, found: Found | None = None, *, replace: bool = False
) -> str | None:
    """Step until it is loaded; `found` gets what requests got. Returns the message of a refusal."""
    core.load_adapter(LoadAdapter(reply_to=7, name=name, path=str(path), replace=replace))
    while True:
        assert core.has_work, "the core sleeps, and nobody hears the reply"
        step(core, {} if found is None else found)
        if replies := core.adapters.take_replies():
            assert [reply.reply_to for reply in replies] == [7]
            return None if replies[0].refusal is None else replies[0].refusal.message


def unload(core: EngineCore, name: str) -> str | None:
    core.unload_adapter(UnloadAdapter(reply_to=8, name=name))
    (reply,) = core.adapters.take_replies()
    return None if reply.refusal is None else reply.refusal.error


def start(core: EngineCore, name: str, adapter: str | None, ids: list[int], num_tokens: int = 6) -> None:
    core.add(GenerateRequest(request_id=name, prompt_ids=ids, params=greedy(num_tokens), adapter=adapter))


def step(core: EngineCore, found: Found) -> None:
    for output in core.step()[0]:
        found.setdefault(output.request_id, []).extend(output.token_ids)
    core.scheduler.check()


def finish(core: EngineCore, found: Found | None = None) -> Found:
    found = {} if found is None else found
    while core.has_work:
        step(core, found)
    return found


def test_an_adapter_is_loaded_used_replaced_and_unloaded(small: AdaptedGemma, small_gemma2_dir: Path) -> None:
    core = core_of(small, small_gemma2_dir, lora_modules=(), lora_dir="/anywhere")
    ids = prompt(17, 3)
    with pytest.raises(UnknownAdapter, match="mine"):
        start(core, "early", "mine", ids)
    assert load(core, "mine", small.paths["eight"]) is None
    found: Found = {}
    start(core, "old", "mine", ids, 24)
    step(core, found)
    assert "load_inplace" in (load(core, "mine", small.paths["sixteen"], found) or "")
    assert load(core, "mine", small.paths["sixteen"], found, replace=True) is None
    start(core, "new", "mine", ids)
    step(core, found)
    assert core.stats().running == 2
    assert unload(core, "mine") is None
    assert unload(core, "mine") == "UnknownAdapter"
    with pytest.raises(UnknownAdapter):
        start(core, "late", "mine", ids)
    assert finish(core, found) == {
        "old": small.greedy("eight", ids, 24),
        "new": small.greedy("sixteen", ids, 6),
    }
    assert core.stats().resident_adapters == []
    assert core.stats().prefix_hits == 0


def test_a_refused_adapter_leaves_the_one_it_was_to_replace(
    small: AdaptedGemma, small_gemma2_dir: Path, tmp_path: Path
) -> None:
    core = core_of(small, small_gemma2_dir)
    assert load(core, "eight", tmp_path / "none", replace=True) is not None
    ids = prompt(9, 5)
    start(core, "a", "eight", ids)
    assert finish(core) == {"a": small.greedy("eight", ids, 6)}


def test_an_unloaded_adapter_gives_its_memory_back_while_idle(
    small: AdaptedGemma, small_gemma2_dir: Path
) -> None:
    core = core_of(small, small_gemma2_dir)
    start(core, "a", "eight", prompt(9))
    finish(core)
    weights = core._runner._adapters  # type: ignore[attr-defined]
    slots = [one._slots for layer in weights._layers for one in layer.values()]
    assert {len([one for one in of_layer if one]) for of_layer in slots} == {1}
    tensors = [weakref.ref(tensor) for of_layer in slots for one in of_layer if one for tensor in one]
    unload(core, "eight")
    core.step()
    assert not any(tensor() is not None for tensor in tensors)


@pytest.mark.parametrize("path", ["x" * 300, "d/" * 3000])
def test_a_path_that_no_file_system_takes_is_refused(
    small: AdaptedGemma, small_gemma2_dir: Path, path: str
) -> None:
    core = core_of(small, small_gemma2_dir)
    assert load(core, "long", Path(path)) is not None


def test_a_reader_without_memory_refuses_and_the_engine_goes_on(
    small: AdaptedGemma, small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = core_of(small, small_gemma2_dir)

    def fail(_: Path) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(core.adapters, "_read", fail)
    assert "RuntimeError" in (load(core, "large", small.paths["eight"]) or "")
    ids = prompt(9, 5)
    start(core, "a", "eight", ids)
    assert finish(core) == {"a": small.greedy("eight", ids, 6)}


def test_an_adapter_unloaded_while_its_last_request_runs_leaves_with_it(
    small: AdaptedGemma, small_gemma2_dir: Path
) -> None:
    core = core_of(small, small_gemma2_dir)
    start(core, "a", "eight", prompt(9))
    core.step()
    adapter = core.adapters.get("eight")
    assert adapter is not None
    weights = weakref.ref(adapter.weights.layers[0]["qkv"].a)
    del adapter
    unload(core, "eight")
    finish(core)
    gc.collect()
    assert weights() is None


def test_a_wrong_number_of_adapters_leaves_the_llm_as_it_was(
    small: AdaptedGemma, small_gemma2_dir: Path
) -> None:
    llm = LLM(str(small_gemma2_dir), dtype="fp32", kv_cache_gib=0.01, threads=1, lora_modules=modules(small))
    for bad in (["eight"], ["eight"] * 4):
        with pytest.raises(ValueError, match="one per prompt"):
            llm.generate([prompt(4)] * 3, adapter=bad)
    with pytest.raises(TypeError):
        llm.generate([prompt(4), 5])  # type: ignore[list-item]
    assert len(llm.generate([prompt(4)] * 2, adapter="eight")) == 2


def test_adapters_need_slots(small: AdaptedGemma, small_gemma2_dir: Path) -> None:
    llm = LLM(str(small_gemma2_dir), dtype="fp32", kv_cache_gib=0.01, threads=1)
    with pytest.raises(BadAdapter, match="lora_modules"):
        llm.load_adapter("a", small.paths["eight"])


def test_an_engine_with_a_bad_adapter_does_not_start(small_gemma2_dir: Path, tmp_path: Path) -> None:
    config = EngineConfig(model="tiny", threads=1, kv_cache_gib=0.01, lora_modules=(f"a={tmp_path}",))
    with pytest.raises(BadAdapter):
        load_engine(config, small_gemma2_dir)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("depth", "has_graphs", "max_loras"), [(1, False, 8), (2, False, 1), (2, True, 2)])
def test_the_device_runner_gives_the_same_tokens(
    small: AdaptedGemma,
    small_gemma2_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    depth: int,
    has_graphs: bool,
    max_loras: int,
) -> None:
    engine = DeviceEngine(
        small_gemma2_dir, monkeypatch, step_depth=depth, has_graphs=has_graphs, max_loras=max_loras,
        lora_modules=modules(small),
    )  # fmt: skip
    expected = {name: small.greedy(name, ids, 5) for name, ids in prompts_of().items()}
    assert mixed(engine.core, num_tokens=5) == expected
    assert (engine.replays > 2) == has_graphs
    assert engine.stream.most_waiting >= depth


@pytest.mark.usefixtures("triton_interpreter")
def test_steps_of_the_base_model_replay_graphs_without_adapters(
    small: AdaptedGemma, small_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DeviceEngine(small_gemma2_dir, monkeypatch, lora_modules=modules(small), max_loras=2)
    runner = engine.core._runner
    assert isinstance(runner, DeviceRunner)
    assert runner.graphs is not None
    with_adapters, without = (runner.graphs.find(1, has_adapters=has_any) for has_any in (True, False))
    assert with_adapters is not None
    assert without is not None
    assert without.tiles is None
    assert with_adapters.tiles is not None
    ids = prompt(7, 4)
    found = engine.run({"base": (ids, greedy(5))})
    assert tokens(found) == {"base": small.greedy(None, ids, 5)}
    assert (with_adapters.tiles == -1).all(), "a step of the base model used the graph with adapters"
    engine.run({"a": (ids, greedy(5))}, adapters={"a": "eight"})
    assert (with_adapters.tiles != -1).any()


def test_slots_on_a_device_keep_their_memory(small: AdaptedGemma) -> None:
    weights = TritonAdapterWeights(small.config, 2, 64, 32, torch.float32, torch.device("cpu"))
    everything = [t for layer in weights._layers for one in layer.values() for t in one[:3]]
    before = [t.data_ptr() for t in everything]
    for name in itertools.islice(itertools.cycle(RANKS), 6):
        weights.put(1, small.read(name))
        weights.put(1, None)
    assert [t.data_ptr() for t in everything] == before
    assert not any(one.ranks.any() for layer in weights._layers for one in layer.values())
