"""From a configuration and a directory to a running engine: settles every `auto`, loads, sizes the pool."""

import gc
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cabochon.engine.adapters.deltas import AdapterWeights, TorchAdapterWeights
from cabochon.engine.adapters.merge import open_weights
from cabochon.engine.adapters.native_deltas import NativeAdapterWeights
from cabochon.engine.adapters.peft_format import read_adapter
from cabochon.engine.adapters.registry import Adapters
from cabochon.engine.attention import Backend, make_attention
from cabochon.engine.config import EngineConfig, default_topic, split_module
from cabochon.engine.core import EngineCore
from cabochon.engine.errors import ConfigError
from cabochon.engine.flash_probe import check_flash, settle_page_tokens
from cabochon.engine.gpu_memory import GIB, PROBE_TOKENS, measure_graphs, measure_peak, pool_bytes, run_probe
from cabochon.engine.grammars import Grammars
from cabochon.engine.hashing import PageHasher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.kv_events import KVEvents
from cabochon.engine.kv_layout import KVLayout, kv_layout
from cabochon.engine.kv_pages import FP8, KVPages
from cabochon.engine.linear import ROW_MULTIPLE
from cabochon.engine.messages import AdapterInfo, EngineInfo
from cabochon.engine.models.checkpoint import Weights
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.gemma import Gemma, LoadTensor
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.page_pool import PagePool
from cabochon.engine.rows import Rows
from cabochon.engine.runner import Runner, StepRunner
from cabochon.engine.sampler import Sampler
from cabochon.engine.scheduler import MAX_CHUNK_TOKENS, WATERMARK, Scheduler
from cabochon.engine.settle import (
    has_triton,
    model_maker,
    settle_backend,
    settle_device,
    settle_dtype,
    settle_kv_dtype,
    settle_linear,
)
from cabochon.engine.streams import stream_for

if TYPE_CHECKING:  # pyzmq is optional
    from cabochon.engine.kv_event_socket import KVEventSocket

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes loaded, bytes in total
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU_POOL_GIB = 2.0
PART_TOKENS = 128  # of a long prompt in a step of a CPU: a tenth of a second on two cores
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": two cores


def load_engine(
    config: EngineConfig,
    model_dir: Path,
    on_progress: Progress | None = None,
    *,
    expects_grammars: bool = False,
    checkpoint: Weights | None = None,
) -> tuple[EngineCore, EngineInfo]:
    """Load the checkpoint in `model_dir`. Raises ModelError, or ConfigError before anything is loaded.

    expects_grammars: be ready for the first one soon, not 3 s after it. checkpoint: takes its files' place.
    """
    started_s = time.monotonic()
    torch.set_num_threads(config.threads or usable_cores())
    model_config = load_model_config(model_dir)
    device = settle_device(config)
    backend = settle_backend(config, device, model_config)
    dtype_name = settle_dtype(config, device)
    dtype = DTYPES[dtype_name]
    make_linear = settle_linear(config, device, dtype_name)
    layout, kv_dtype = _settle_layout(config, model_config, backend, dtype, device)
    max_len = _wanted_len(config, model_config)
    kv_events = _open_kv_events(config, layout)
    is_measured = device.type == "cuda" and config.kv_cache_gib is None
    if not is_measured:  # what cannot hold is found before minutes of loading
        num_pages = int((config.kv_cache_gib or CPU_POOL_GIB) * GIB) // layout.page_bytes
        max_len = _settle_max_model_len(config, max_len, layout, num_pages)
    adapters, adapter_infos = _load_adapters(config, model_config, dtype)
    grammars = _grammars(model_dir, model_config, is_started=expects_grammars)
    weights = checkpoint or open_weights(config, model_dir, model_config)
    make_model = model_maker(backend, model_config, make_linear)
    model = _load_model(make_model, model_config, weights, dtype, device, max_len, on_progress)
    builder = _CoreBuilder(config, model, layout, device, dtype, kv_dtype, backend, grammars, adapters)
    if is_measured:
        num_pages = builder.measured_pages(max_len)
        max_len = _settle_max_model_len(config, max_len, layout, num_pages)
    core, pages = builder.build(num_pages, max_len, kv_events)
    info = EngineInfo(
        model=config.model,
        architecture=model_config.architecture,
        model_dir=str(model_dir),
        dtype=dtype_name,
        device=str(device),
        attention_backend=backend,
        vocab_size=model_config.vocab_size,
        max_model_len=max_len,
        max_seqs=config.max_seqs,
        eos_token_ids=list(model_config.eos_token_ids),
        page_tokens=layout.page_tokens,
        num_pages=num_pages,
        num_groups=layout.num_groups,
        kv_bytes=pages.num_bytes,
        weight_bytes=model.num_bytes,
        quantization=config.quantization,
        max_loras=config.num_slots,
        adapters=adapter_infos,
        load_s=time.monotonic() - started_s,
    )
    _log_ready(info)
    return core, info


def _settle_layout(
    config: EngineConfig, model: ModelConfig, backend: Backend, dtype: torch.dtype, device: torch.device
) -> tuple[KVLayout, torch.dtype]:
    """And the dtype of K and V. Raises ConfigError if the backend cannot have them, or cannot run at all."""
    if backend == "flash-attn":
        check_flash(device, dtype, model.head_dim)
    kv_dtype = settle_kv_dtype(config, backend, dtype)
    page_tokens = settle_page_tokens(config.page_tokens, backend)
    return kv_layout(model, page_tokens, kv_dtype.itemsize, has_scales=kv_dtype == FP8), kv_dtype


def _open_kv_events(config: EngineConfig, layout: KVLayout) -> "KVEventSocket | None":
    """None if nobody is to be told. Raises ConfigError."""
    if config.kv_events_endpoint is None:
        return None
    topic = config.kv_events_topic or default_topic(config.model)
    try:
        from cabochon.engine.kv_event_socket import KVEventSocket  # pyzmq is optional
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"kv_events_endpoint needs pyzmq, got {error}: install cabochon[kv-events], or leave it out"
        ) from None
    groups = [group for group, window in enumerate(layout.windows) if window is None]
    return KVEventSocket(config.kv_events_endpoint, topic, KVEvents(layout.page_tokens, groups))


def _load_adapters(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype
) -> tuple[Adapters, list[AdapterInfo]]:
    """Those of lora_modules, into host memory. Raises BadAdapter."""
    read = partial(read_adapter, model=model, dtype=dtype, max_rank=config.max_lora_rank)
    adapters = Adapters(read if config.num_slots else None)
    return adapters, [adapters.load(*split_module("lora_modules", one)) for one in config.lora_modules]


def _grammars(model_dir: Path, model: ModelConfig, *, is_started: bool) -> Grammars:
    grammars = Grammars(model_dir, model.vocab_size, list(model.eos_token_ids))
    if is_started:
        grammars.start()
    return grammars


def _log_ready(info: EngineInfo) -> None:
    logger.info(
        "engine ready architecture=%s device=%s attention=%s dtype=%s threads=%d pages=%d page_tokens=%d"
        " kv_bytes=%d weight_bytes=%d",
        info.architecture, info.device, info.attention_backend, info.dtype, torch.get_num_threads(),
        info.num_pages, info.page_tokens, info.kv_bytes, info.weight_bytes,
    )  # fmt: skip


def usable_cores(quota_file: Path = CGROUP_QUOTA) -> int:
    """Cores that this process may use at once: by affinity, and by the CPU limit of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or `max`: no limit
        return cores


def _wanted_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_model_len or model.max_model_len
    if wanted > model.max_model_len:
        raise ConfigError(
            f"max_model_len must be at most {model.max_model_len}, the context this checkpoint was trained"
            f" for, got {wanted}: lower it"
        )
    return wanted


def _settle_max_model_len(config: EngineConfig, wanted: int, layout: KVLayout, num_pages: int) -> int:
    """The pool must hold one sequence of full length, so that a request alone can always finish."""
    chunk = min(config.step_tokens, MAX_CHUNK_TOKENS)
    low, high = 0, wanted  # the longest sequence that fits, by bisection: pages grow with the length
    while low < high:
        middle = (low + high + 1) // 2
        fits = layout.pages_per_sequence(middle, chunk) <= num_pages
        low, high = (middle, high) if fits else (low, middle - 1)
    gib = config.kv_cache_gib or round(num_pages * layout.page_bytes / GIB, 2)
    if low < 2 or (config.max_model_len is not None and low < wanted):
        raise ConfigError(
            f"kv_cache_gib must hold one sequence of max_model_len tokens; {gib:g} GiB hold"
            f" {low} of {wanted}: raise kv_cache_gib or lower max_model_len"
        )
    return low


def _load_model(
    make_model: Callable[[ModelConfig, LoadTensor, int], Gemma],
    config: ModelConfig,
    checkpoint: Weights,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    on_progress: Progress | None,
) -> Gemma:
    done = 0

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal done
        tensor = checkpoint.load(name, shape, dtype, device)
        done += tensor.nbytes
        if on_progress is not None:
            on_progress(done, checkpoint.num_elements * dtype.itemsize)
        return tensor

    model = make_model(config, load, max_model_len)
    checkpoint.close()
    return model


@dataclass(frozen=True, slots=True)
class _CoreBuilder:
    """What a core is made of, but for its pages: on a GPU a first one shows how many there is room for."""

    config: EngineConfig
    model: Gemma
    layout: KVLayout
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    backend: Backend
    grammars: Grammars
    adapters: Adapters

    def build(
        self, num_pages: int, max_model_len: int, kv_events: "KVEventSocket | None" = None
    ) -> tuple[EngineCore, KVPages]:
        """An idle core with that many pages."""
        config, model = self.config, self.model
        events = None if kv_events is None else kv_events.events
        pool = PagePool(num_pages, None if events is None else events.lose)
        rows = Rows(
            max_seqs=config.max_seqs,
            max_model_len=max_model_len,
            num_groups=self.layout.num_groups,
            page_tokens=self.layout.page_tokens,
        )
        pages = KVPages(model.config, self.layout, num_pages, self.kv_dtype, self.device)
        hasher = PageHasher(os.urandom(32)) if config.prefix_caching else None
        cache = KVCache(rows, pool, hasher, self.layout.windows, events)
        scheduler = Scheduler(
            rows,
            cache,
            step_tokens=config.step_tokens,
            part_tokens=PART_TOKENS if self.device.type == "cpu" else None,
            eos_token_ids=model.config.eos_token_ids,
            max_model_len=max_model_len,
            vocab_size=model.config.vocab_size,
            max_loras=config.num_slots,
        )
        depth = config.step_depth if self.has_device_rows else 1
        runner = self._runner(rows, pages)
        core = EngineCore(
            scheduler, runner, rows, cache, self.grammars, self.adapters, depth=depth, kv_events=kv_events
        )
        return core, pages

    @property
    def has_device_rows(self) -> bool:
        """Where the kernels run that prepare and sample; elsewhere the host does both."""
        return self.backend == "triton" or (self.device.type == "cuda" and has_triton())

    def _runner(self, rows: Rows, pages: KVPages) -> StepRunner:
        model = self.model
        attention = make_attention(self.backend, model.config, pages)
        if not self.has_device_rows:
            sampler = Sampler(model.config.vocab_size, model.config.final_softcap, self.device)
            return Runner(model, attention, sampler, self._host_adapters())
        # triton is optional: a CPU has no use for it
        from cabochon.engine.adapters.triton_deltas import TritonAdapterWeights
        from cabochon.engine.decode_graphs import capture_cuda, graph_sizes
        from cabochon.engine.device_runner import DeviceRunner

        config, adapters = self.config, None
        if config.num_slots:
            max_rows = max(config.step_tokens + ROW_MULTIPLE, graph_sizes(config.max_seqs)[-1])
            adapters = TritonAdapterWeights(
                model.config, config.num_slots, config.max_lora_rank, max_rows, self.dtype, self.device
            )
        runner = DeviceRunner(
            model, attention, rows, stream_for(self.device), depth=config.step_depth, adapters=adapters
        )
        if config.cuda_graphs and self.device.type == "cuda" and model.is_graph_safe:
            runner.add_graphs(graph_sizes(config.max_seqs), capture_cuda())
        return runner

    def _host_adapters(self) -> AdapterWeights | None:
        num_slots = self.config.num_slots
        if not num_slots:
            return None
        if self.backend == "native":
            return NativeAdapterWeights(self.model.config, num_slots, self.dtype)
        return TorchAdapterWeights(self.model.config, num_slots, self.dtype, self.device)

    def measured_pages(self, max_model_len: int) -> int:
        """Pages that fit on the GPU beside the weights, the largest step and the decode graphs."""
        taken = self._peak(max_model_len)
        gc.collect()  # the probe's engine, pages and graphs
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        share = self.config.gpu_memory_utilization
        left = pool_bytes(total=total, used=total - free, peak=taken, utilization=share)
        return left // self.layout.page_bytes

    def _peak(self, max_model_len: int) -> int:
        """Bytes of the largest step and of all graphs, seen on a core with few pages that ends with this."""
        config = self.config
        per_row = max(1, config.step_tokens // config.max_seqs) + PROBE_TOKENS
        num_pages = config.max_seqs * self.layout.pages_per_sequence(per_row, per_row)
        num_pages += int(2 * WATERMARK * num_pages) + 1  # which admission leaves free
        built: list[tuple[EngineCore, KVPages]] = []

        def build_and_run() -> None:  # rows and sampling buffers count, too
            built.append(self.build(num_pages, max_model_len))
            run_probe(
                built[0][0],
                step_tokens=config.step_tokens,
                max_seqs=config.max_seqs,
                max_model_len=max_model_len,
            )

        peak = measure_peak(build_and_run, self.device) - built[0][1].num_bytes
        return peak + measure_graphs(built[0][0], self.device)
