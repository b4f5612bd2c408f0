"""From a configuration and a directory to a running engine: settles every `auto`, loads, sizes the pool."""

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.errors import ConfigError
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
GIB = 2**30
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": two cores


def load_engine(
    config: EngineConfig,
    model_dir: Path,
    on_progress: Progress | None = None,
    *,
    expects_grammars: bool = False,
) -> tuple[EngineCore, EngineInfo]:
    """Load the checkpoint in `model_dir`. Raises ModelError, or ConfigError before anything is loaded.

    expects_grammars: be ready for the first one soon, instead of 3 s after it.
    """
    started_s = time.monotonic()
    torch.set_num_threads(config.threads or usable_cores())
    model_config = load_model_config(model_dir)
    dtype = DTYPES[_settle_dtype(config)]
    layout = kv_layout(model_config, config.page_tokens, dtype.itemsize)
    num_pages = int(config.kv_cache_gib * GIB) // layout.page_bytes
    max_model_len = _settle_max_model_len(config, model_config, layout, num_pages)
    grammars = Grammars(model_dir, model_config.vocab_size, list(model_config.eos_token_ids))
    if expects_grammars:
        grammars.start()
    model = _load_model(model_config, model_dir, dtype, max_model_len, on_progress)
    pages = KVPages(model_config, layout, num_pages, dtype, torch.device("cpu"))
    core = _build_core(config, model, layout, pages, num_pages, max_model_len, grammars)
    info = EngineInfo(
        model=config.model,
        architecture=model_config.architecture,
        model_dir=str(model_dir),
        dtype=_settle_dtype(config),
        device="cpu",
        attention_backend="torch",
        vocab_size=model_config.vocab_size,
        max_model_len=max_model_len,
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
        "engine ready architecture=%s dtype=%s threads=%d pages=%d page_tokens=%d kv_bytes=%d"
        " weight_bytes=%d",
        info.architecture, info.dtype, torch.get_num_threads(), num_pages, config.page_tokens, info.kv_bytes,
        info.weight_bytes,
    )  # fmt: skip
    return core, info


def _settle_dtype(config: EngineConfig) -> str:
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if config.dtype == "auto":
        return "bf16" if has_bf16 else "fp32"
    if config.dtype == "bf16" and not has_bf16:
        raise ConfigError("dtype must be fp32 on a CPU without bf16 instructions, got bf16: use fp32")
    return config.dtype


def usable_cores(quota_file: Path = CGROUP_QUOTA) -> int:
    """Cores that this process may use at once: by affinity, and by the CPU limit of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or `max`: no limit
        return cores


def _settle_max_model_len(config: EngineConfig, model: ModelConfig, layout: KVLayout, num_pages: int) -> int:
    """The pool must hold one sequence of full length, so that a request alone can always finish."""
    chunk = min(config.step_tokens, MAX_CHUNK_TOKENS)
    wanted = config.max_model_len or model.max_model_len
    if wanted > model.max_model_len:
        raise ConfigError(
            f"max_model_len must be at most {model.max_model_len}, the context this checkpoint was trained"
            f" for, got {wanted}: lower it"
        )
    low, high = 0, wanted  # the longest sequence that fits, by bisection: pages grow with the length
    while low < high:
        middle = (low + high + 1) // 2
        fits = layout.pages_per_sequence(middle, chunk) <= num_pages
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < 2 or (config.max_model_len is not None and low < wanted):
        raise ConfigError(
            f"kv_cache_gib must hold one sequence of max_model_len tokens; {config.kv_cache_gib:g} GiB hold"
            f" {low} of {wanted}: raise kv_cache_gib or lower max_model_len"
        )
    return low


def _load_model(
    config: ModelConfig, model_dir: Path, dtype: torch.dtype, max_model_len: int, on_progress: Progress | None
) -> Gemma:
    checkpoint = Checkpoint(model_dir)
    done = 0

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal done
        tensor = checkpoint.load(name, shape, dtype)
        done += tensor.nbytes
        if on_progress is not None:
            on_progress(done, checkpoint.num_elements * dtype.itemsize)
        return tensor

    model = Gemma(config, load, max_model_len)
    checkpoint.close()
    return model


def _build_core(
    config: EngineConfig,
    model: Gemma,
    layout: KVLayout,
    pages: KVPages,
    num_pages: int,
    max_model_len: int,
    grammars: Grammars,
) -> EngineCore:
    rows = Rows(
        max_seqs=config.max_seqs,
        max_model_len=max_model_len,
        num_groups=layout.num_groups,
        page_tokens=config.page_tokens,
    )
    hasher = PageHasher(os.urandom(32)) if config.prefix_caching else None
    cache = KVCache(rows, PagePool(num_pages), hasher, layout.windows)
    scheduler = Scheduler(
        rows,
        cache,
        step_tokens=config.step_tokens,
        eos_token_ids=model.config.eos_token_ids,
        max_model_len=max_model_len,
        vocab_size=model.config.vocab_size,
    )
    sampler = Sampler(model.config.vocab_size, model.config.final_softcap)
    return EngineCore(scheduler, Runner(model, pages, sampler), rows, cache, grammars)
