"""From a configuration and a directory to a running engine: settles every `auto`, loads, sizes the pool."""

import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from cabochon.engine.attention import make_attention
from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.errors import ConfigError
from cabochon.engine.gpu_memory import GIB, PROBE_TOKENS, measure_peak, pool_bytes, run_probe
from cabochon.engine.grammars import Grammars
from cabochon.engine.hashing import PageHasher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.kv_layout import KVLayout, kv_layout
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.messages import EngineInfo
from cabochon.engine.models.checkpoint import Checkpoint
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.page_pool import PagePool
from cabochon.engine.rows import Rows
from cabochon.engine.runner import Runner
from cabochon.engine.sampler import Sampler
from cabochon.engine.scheduler import MAX_CHUNK_TOKENS, Scheduler

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes loaded, bytes in total
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU_POOL_GIB = 2.0
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": two cores


def load_engine(
    config: EngineConfig,
    model_dir: Path,
    on_progress: Progress | None = None,
    *,
    expects_grammars: bool = False,
    checkpoint: Checkpoint | None = None,
) -> tuple[EngineCore, EngineInfo]:
    """Load the checkpoint in `model_dir`. Raises ModelError, or ConfigError before anything is loaded.

    expects_grammars: be ready for the first one soon, not 3 s after it. checkpoint: takes its files' place.
    """
    started_s = time.monotonic()
    torch.set_num_threads(config.threads or usable_cores())
    model_config = load_model_config(model_dir)
    device = settle_device(config)
    backend = settle_backend(config, device)
    dtype_name = _settle_dtype(config, device)
    dtype = DTYPES[dtype_name]
    layout = kv_layout(model_config, config.page_tokens, dtype.itemsize)
    max_len = _wanted_len(config, model_config)
    is_measured = device.type == "cuda" and config.kv_cache_gib is None
    if not is_measured:  # what cannot hold is found before minutes of loading
        num_pages = int((config.kv_cache_gib or CPU_POOL_GIB) * GIB) // layout.page_bytes
        max_len = _settle_max_model_len(config, max_len, layout, num_pages)
    grammars = Grammars(model_dir, model_config.vocab_size, list(model_config.eos_token_ids))
    if expects_grammars:
        grammars.start()
    weights = checkpoint or Checkpoint(model_dir)
    model = _load_model(model_config, weights, dtype, device, max_len, on_progress)
    builder = _CoreBuilder(config, model, layout, device, dtype, backend, grammars)
    if is_measured:
        num_pages = builder.measured_pages(max_len)
        max_len = _settle_max_model_len(config, max_len, layout, num_pages)
    core, pages = builder.build(num_pages, max_len)
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
        page_tokens=config.page_tokens,
        num_pages=num_pages,
        num_groups=layout.num_groups,
        kv_bytes=pages.num_bytes,
        weight_bytes=model.num_bytes,
        load_s=time.monotonic() - started_s,
    )
    logger.info(
        "engine ready architecture=%s device=%s attention=%s dtype=%s threads=%d pages=%d page_tokens=%d"
        " kv_bytes=%d weight_bytes=%d",
        info.architecture, info.device, info.attention_backend, info.dtype, torch.get_num_threads(),
        num_pages, config.page_tokens, info.kv_bytes, info.weight_bytes,
    )  # fmt: skip
    return core, info


def settle_device(config: EngineConfig) -> torch.device:
    """Raises ConfigError if a GPU is asked for and torch sees none."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "device must be cpu where torch finds no NVIDIA GPU, got cuda: install a CUDA build of torch and"
            " its driver, or use cpu"
        )
    if config.device == "auto" and has_gpu:
        logger.warning("device=cpu reason=the GPU path has not run on a GPU yet, ask for it: --device cuda")
    return torch.device("cuda" if config.device == "cuda" else "cpu")


def settle_backend(config: EngineConfig, device: torch.device) -> Literal["torch", "triton"]:
    """`auto` says why. Raises ConfigError if Triton is asked for where it cannot run."""
    has_triton = importlib.util.find_spec("triton") is not None
    can_triton = has_triton and (
        device.type == "cuda" or (config.attention_backend == "triton" and _is_interpreted())
    )
    if config.attention_backend == "triton" and not can_triton:
        raise ConfigError(
            f"attention_backend must be torch on this {device.type}"
            f" {'with' if has_triton else 'without'} triton installed, got triton: use torch"
        )
    if config.attention_backend != "auto":
        return config.attention_backend
    if device.type == "cuda" and has_triton:
        logger.info("attention backend=triton reason=an NVIDIA GPU")
        return "triton"
    logger.info("attention backend=torch reason=%s", "no GPU" if device.type == "cpu" else "no triton")
    return "torch"


def _is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    import triton  # never on the start path of a CPU engine

    return bool(triton.knobs.runtime.interpret)


def _settle_dtype(config: EngineConfig, device: torch.device) -> str:
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if config.dtype == "auto":
        return "bf16" if has_bf16 else "fp32"
    if config.dtype == "bf16" and not has_bf16:
        raise ConfigError(
            f"dtype must be fp32 on a {device.type} without bf16 instructions, got bf16: use fp32"
        )
    return config.dtype


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
    config: ModelConfig,
    checkpoint: Checkpoint,
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

    model = Gemma(config, load, max_model_len)
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
    backend: Literal["torch", "triton"]
    grammars: Grammars

    def build(self, num_pages: int, max_model_len: int) -> tuple[EngineCore, KVPages]:
        """An idle core with that many pages."""
        config, model = self.config, self.model
        rows = Rows(
            max_seqs=config.max_seqs,
            max_model_len=max_model_len,
            num_groups=self.layout.num_groups,
            page_tokens=config.page_tokens,
        )
        pages = KVPages(model.config, self.layout, num_pages, self.dtype, self.device)
        hasher = PageHasher(os.urandom(32)) if config.prefix_caching else None
        cache = KVCache(rows, PagePool(num_pages), hasher, self.layout.windows)
        scheduler = Scheduler(
            rows,
            cache,
            step_tokens=config.step_tokens,
            eos_token_ids=model.config.eos_token_ids,
            max_model_len=max_model_len,
            vocab_size=model.config.vocab_size,
        )
        sampler = Sampler(model.config.vocab_size, model.config.final_softcap, self.device)
        runner = Runner(model, make_attention(self.backend, model.config, pages), sampler)
        return EngineCore(scheduler, runner, rows, cache, self.grammars), pages

    def measured_pages(self, max_model_len: int) -> int:
        """Pages that fit on the GPU beside the weights and the largest step."""
        peak = self._peak(max_model_len)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        share = self.config.gpu_memory_utilization
        left = pool_bytes(total=total, used=total - free, peak=peak, utilization=share)
        return left // self.layout.page_bytes

    def _peak(self, max_model_len: int) -> int:
        """Bytes of the largest step, seen on a core with few pages that ends with this call."""
        config = self.config
        per_row = max(1, config.step_tokens // config.max_seqs) + PROBE_TOKENS
        num_pages = config.max_seqs * self.layout.pages_per_sequence(per_row, per_row)
        core, _ = self.build(num_pages, max_model_len)
        probe = partial(
            run_probe,
            core,
            step_tokens=config.step_tokens,
            max_seqs=config.max_seqs,
            max_model_len=max_model_len,
        )
        return measure_peak(probe, self.device)
