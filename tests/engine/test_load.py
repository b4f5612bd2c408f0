"""From a directory to an engine: what `auto` becomes, what is refused, what the engine says of itself."""

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.errors import ConfigError
from cabochon.engine.kv_layout import KVLayout, kv_layout
from cabochon.engine.linear import Fp8Linear, Linear
from cabochon.engine.load import load_engine, usable_cores
from cabochon.engine.messages import EngineInfo, GenerateRequest, RequestOutput
from cabochon.engine.models.checkpoint import CPU, Checkpoint
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.settle import model_class_for, settle_linear
from cabochon.kernels.native.screen import can_screen

PAGE_TOKENS = 4
STEP_TOKENS = 16


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(directory: Path, **options: object) -> tuple[EngineCore, EngineInfo]:
    defaults = {
        "model": "tiny", "dtype": "fp32", "page_tokens": PAGE_TOKENS, "max_seqs": 4, "threads": 1,
        "step_tokens": STEP_TOKENS, "kv_cache_gib": 0.002,
    }  # fmt: skip
    return load_engine(EngineConfig(**{**defaults, **options}), directory)


def layout_of(directory: Path) -> KVLayout:
    return kv_layout(load_model_config(directory), PAGE_TOKENS, itemsize=4)


def gib_for(layout: KVLayout, num_pages: int) -> float:
    return (num_pages + 0.5) * layout.page_bytes / 2**30


def run(core: EngineCore, prompt: list[int], **params: object) -> list[RequestOutput]:
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True, **params})
    core.add(GenerateRequest(request_id="a", prompt_ids=prompt, params=sampling))
    outputs = []
    while core.has_work:
        outputs += core.step()[0]
    return outputs


def matrices(directory: Path) -> list[tuple[str, list[int]]]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        shapes = [(name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return [(name, shape) for name, shape in shapes if len(shape) == 2]


class Ones(Checkpoint):
    """Every tensor that is asked for, from no file."""

    def __init__(self) -> None:
        self.num_elements = 0

    def load(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
    ) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    def close(self) -> None:
        pass


def test_tensors_may_come_from_elsewhere(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_gemma2_dir / "config.json", tmp_path)
    config = EngineConfig(model="tiny", dtype="fp32", kv_cache_gib=0.01, max_model_len=64, threads=1)
    core, info = load_engine(config, tmp_path, checkpoint=Ones())
    assert info.weight_bytes > 0
    logits = core.prompt_logits([3, 4])
    assert (logits == logits[0]).all(), "all rows of the head are the same"


@pytest.mark.parametrize(("is_supported", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_cpu_multiplies_it(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, is_supported: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    assert load(tiny_gemma2_dir, dtype="auto")[1].dtype == dtype


def test_fp8_pages_are_refused_where_nothing_reads_them(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_gemma2_dir / "config.json", tmp_path)  # before weights are looked for
    message = (
        "kv_dtype must be auto with the native attention backend, got fp8: use auto, or a GPU and"
        " attention_backend triton"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(tmp_path, kv_dtype="fp8")


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("kv_dtype", "head_bytes"), [("auto", 16 * 4), ("fp8", 16 + 4)])
def test_fp8_pages_hold_more_tokens(tiny_gemma2_dir: Path, kv_dtype: str, head_bytes: int) -> None:
    _, info = load(tiny_gemma2_dir, kv_dtype=kv_dtype, attention_backend="triton")
    page_bytes = layout_of(tiny_gemma2_dir).page_bytes // (16 * 4) * head_bytes
    assert info.num_pages == int(0.002 * 2**30) // page_bytes
    assert info.kv_bytes == (info.num_pages + 1) * page_bytes
    assert info.dtype == "fp32"


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(
    ("backend", "head_dim", "name"),
    [
        ("torch", 16, "Gemma"),
        ("native", 16, "NativeGemma"),
        ("triton", 16, "TritonGemma"),
        ("triton", 24, "Gemma"),
    ],
)
def test_the_fused_model_is_taken_where_its_kernels_run(
    tiny_gemma2_dir: Path, backend: str, head_dim: int, name: str
) -> None:
    config = dataclasses.replace(load_model_config(tiny_gemma2_dir), head_dim=head_dim)
    assert model_class_for(backend, config).__name__ == name  # type: ignore[arg-type]


def screen_bytes(directory: Path) -> int:
    """Of the head in bf16, on a CPU that can have one: values, scales and errors of whole vectors."""
    config = load_model_config(directory)
    return (-(-config.vocab_size // 64) * 64) * (config.hidden_size + 8) if can_screen() else 0


@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_weights_and_pages_have_the_dtype_that_is_asked_for(
    tiny_gemma2_dir: Path, dtype: str, itemsize: int
) -> None:
    _, info = load(tiny_gemma2_dir, dtype=dtype)
    sizes = {name: rows * columns for name, (rows, columns) in matrices(tiny_gemma2_dir)}
    both_heads = sum(sizes.values()) + sizes["model.embed_tokens.weight"]  # the packed one is a copy
    screen = screen_bytes(tiny_gemma2_dir) if dtype == "bf16" else 0
    assert info.weight_bytes == itemsize * both_heads + screen
    page_bytes = layout_of(tiny_gemma2_dir).page_bytes * itemsize // 4
    assert info.num_pages == int(0.002 * 2**30) // page_bytes
    assert info.kv_bytes == (info.num_pages + 1) * page_bytes


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_fp8_runs_where_the_gpu_has_its_products(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda = torch.device("cuda")
    assert settle_linear(EngineConfig(quantization="fp8"), cuda, "bf16") is Fp8Linear
    assert settle_linear(EngineConfig(), cuda, "bf16") is Linear


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_fp8_is_refused_on_a_gpu_without_its_products(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    message = (
        "quantization must be none on a GPU of compute capability below 8.9, which has no fp8 products,"
        f" got fp8 and {capability[0]}.{capability[1]}: use none"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        settle_linear(EngineConfig(quantization="fp8"), torch.device("cuda"), "bf16")


def test_fp8_on_a_gpu_is_refused_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ConfigError, match="dtype must be bf16 with quantization fp8 on a GPU, got fp32"):
        settle_linear(EngineConfig(quantization="fp8"), torch.device("cuda"), "fp32")


def test_int8_takes_a_byte_for_each_weight(tiny_gemma2_dir: Path) -> None:
    plain, info = (load(tiny_gemma2_dir, dtype="bf16", quantization=name)[1] for name in ("none", "int8"))
    assert info.quantization == "int8"
    sizes = matrices(tiny_gemma2_dir)
    weights = sum(rows * columns for _, (rows, columns) in sizes)  # the head's copy among them
    scales = sum(4 * rows for _, (rows, _) in sizes) + 4 * info.vocab_size
    assert plain.weight_bytes - info.weight_bytes == weights - scales  # each has the same screen


def test_fp8_on_a_cpu_says_that_it_is_emulated_and_counts_its_bytes(
    tiny_gemma2_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load(tiny_gemma2_dir, dtype="bf16")[1]
    assert plain.quantization == "none"
    assert "emulated" not in caplog.text
    info = load(tiny_gemma2_dir, dtype="bf16", quantization="fp8")[1]
    assert "quantization=fp8 device=cpu is emulated, slower than none and no smaller" in caplog.text
    assert info.quantization == "fp8"
    channels = sum(
        rows for name, (rows, _) in matrices(tiny_gemma2_dir)
    )  # of each matrix, the head's among them
    assert info.weight_bytes == plain.weight_bytes + 4 * channels - screen_bytes(tiny_gemma2_dir)


def test_the_engine_says_what_it_has_loaded(tiny_gemma3_dir: Path) -> None:
    core, info = load(tiny_gemma3_dir, model="as given")
    assert (info.model, info.architecture) == ("as given", "Gemma3ForCausalLM")
    assert info.model_dir == str(tiny_gemma3_dir)
    assert (info.device, info.attention_backend, info.max_seqs, info.page_tokens) == ("cpu", "native", 4, 4)
    assert (info.max_model_len, info.eos_token_ids) == (512, [1])
    assert info.num_groups == 7  # six sliding layers and one global: groups of one
    assert info.load_s > 0
    assert core.stats().pages_total == info.num_pages


def test_one_line_says_that_the_engine_is_ready(
    tiny_gemma2_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cabochon")
    _, info = load(tiny_gemma2_dir)
    expected = (
        "engine ready architecture=Gemma2ForCausalLM device=cpu attention=native dtype=fp32 threads=1"
        f" pages={info.num_pages} page_tokens=4 kv_bytes={info.kv_bytes} weight_bytes={info.weight_bytes}"
    )
    assert [record.getMessage() for record in caplog.records if "ready" in record.getMessage()] == [expected]


def test_pages_have_16_tokens_unless_a_size_or_another_backend_is_asked_for(tiny_gemma2_dir: Path) -> None:
    assert load(tiny_gemma2_dir, page_tokens=None)[1].page_tokens == 16


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_gets_the_threads_that_are_asked_for(tiny_gemma2_dir: Path, threads: int) -> None:
    load(tiny_gemma2_dir, threads=threads)
    assert torch.get_num_threads() == threads


def test_without_a_number_torch_gets_the_cores_of_this_process(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    load(tiny_gemma2_dir, threads=None)
    assert torch.get_num_threads() == 3


def test_a_context_longer_than_the_models_is_refused(tiny_gemma2_dir: Path) -> None:
    message = (
        "max_model_len must be at most 512, the context this checkpoint was trained for, got 513: lower it"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(tiny_gemma2_dir, max_model_len=513)
    assert load(tiny_gemma2_dir, max_model_len=512)[1].max_model_len == 512


@pytest.mark.parametrize("max_model_len", [100, 512])
def test_a_pool_that_does_not_hold_the_context_asked_for_is_refused(
    tiny_gemma2_dir: Path, max_model_len: int
) -> None:
    layout = layout_of(tiny_gemma2_dir)
    pages = layout.pages_per_sequence(max_model_len, STEP_TOKENS)
    gib = gib_for(layout, pages - 1)
    longest = max(n for n in range(1, 512) if layout.pages_per_sequence(n, STEP_TOKENS) < pages)
    message = (
        f"kv_cache_gib must hold one sequence of max_model_len tokens; {gib:g} GiB hold {longest} of"
        f" {max_model_len}: raise kv_cache_gib or lower max_model_len"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(tiny_gemma2_dir, max_model_len=max_model_len, kv_cache_gib=gib)
    enough = gib_for(layout, pages)
    assert load(tiny_gemma2_dir, max_model_len=max_model_len, kv_cache_gib=enough)[1].num_pages == pages


@pytest.mark.parametrize(("page_tokens", "num_pages", "longest"), [(4, 0, 0), (4, 1, 0), (1, 3, 1)])
def test_a_pool_that_holds_no_two_tokens_is_refused(
    tiny_gemma2_dir: Path, page_tokens: int, num_pages: int, longest: int
) -> None:
    gib = gib_for(kv_layout(load_model_config(tiny_gemma2_dir), page_tokens, 4), num_pages)
    with pytest.raises(ConfigError, match=f"hold {longest} of 512: raise kv_cache_gib or lower"):
        load(tiny_gemma2_dir, kv_cache_gib=gib, page_tokens=page_tokens)


@pytest.mark.parametrize("options", [{"max_model_len": 513}, {"kv_cache_gib": 1e-9}], ids=str)
def test_settings_that_cannot_hold_together_are_refused_before_weights_are_looked_for(
    tiny_gemma2_dir: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    shutil.copy(tiny_gemma2_dir / "config.json", tmp_path)
    with pytest.raises(ConfigError):
        load(tmp_path, **options)


@pytest.mark.parametrize("num_pages", [2, 9, 60])
def test_without_max_model_len_it_is_what_the_pool_holds_and_such_a_request_ends(
    tiny_gemma2_dir: Path, num_pages: int
) -> None:
    layout = layout_of(tiny_gemma2_dir)
    core, info = load(tiny_gemma2_dir, kv_cache_gib=gib_for(layout, num_pages))
    length = info.max_model_len
    assert layout.pages_per_sequence(length, STEP_TOKENS) <= info.num_pages == num_pages
    assert layout.pages_per_sequence(length + 1, STEP_TOKENS) > num_pages
    outputs = run(core, [9] * (length // 2), max_tokens=length - length // 2)
    assert outputs[-1].finish_reason == "length"
    assert len(outputs) == length - length // 2
    assert core.stats().preemptions == 0


def test_progress_only_grows_and_reaches_the_total(tiny_gemma2_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = EngineConfig(dtype="fp32", kv_cache_gib=0.002, threads=1)
    load_engine(config, tiny_gemma2_dir, lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert len(totals) == 1
    assert done == sorted(done)
    assert min(done) > 0
    assert done[-1] == totals.pop()
    assert len(seen) > 10


def test_progress_is_in_bytes(tiny_gemma2_dir: Path) -> None:
    totals: set[int] = set()
    config = EngineConfig(dtype="fp32", kv_cache_gib=0.002, threads=1)
    load_engine(config, tiny_gemma2_dir, lambda _, total: totals.add(total))
    header_bytes = 64 * 1024
    assert totals.pop() > (tiny_gemma2_dir / "model.safetensors").stat().st_size - header_bytes


@pytest.mark.parametrize(("prefix_caching", "cached_tokens"), [(True, 36), (False, 0)])
def test_pages_are_shared_only_with_prefix_caching(
    tiny_gemma2_dir: Path, prefix_caching: bool, cached_tokens: int
) -> None:
    core, _ = load(tiny_gemma2_dir, prefix_caching=prefix_caching)
    prompt = list(range(10, 50))
    first, second = run(core, prompt), run(core, prompt)
    assert first[0].cached_tokens == 0
    assert second[0].cached_tokens == cached_tokens
    assert [o.token_ids for o in first] == [o.token_ids for o in second]
    assert (core.stats().pages_cached > 0) is prefix_caching
    assert core.stats().prefix_hits == cached_tokens


def test_two_engines_name_their_pages_with_keys_of_their_own(tiny_gemma2_dir: Path) -> None:
    roots = [load(tiny_gemma2_dir)[0]._cache._hasher.root(None, None) for _ in range(2)]
    assert roots[0] != roots[1]


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("max 100000", None), ("", None)])
def test_the_cpu_limit_of_a_container_counts(tmp_path: Path, quota: str, cores: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert usable_cores(file) == (cores or len(os.sched_getaffinity(0)))
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))
