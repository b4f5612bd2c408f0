"""The engine on random weights, driven step by step as its process drives it."""

import gc
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from cases import Absent
from numpy.typing import NDArray
from random_weights import RandomCheckpoint, directory
from transformers import Gemma2Config

from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.load import load_engine
from cabochon.engine.messages import EngineInfo, GenerateRequest, RequestOutput
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.scheduler import MAX_CHUNK_TOKENS

GIB = 2**30
PAGE_TOKENS = 16
SPARE = 1.03  # the scheduler admits nobody into the last pages
ACTIVATION_BYTES = 3 * 2**30
ITEM_BYTES = {"bf16": 2, "fp32": 4}
numbers = itertools.count()


class Engine(NamedTuple):
    """num_graphs: captured ones, 0 where decode steps are eager."""

    core: EngineCore
    info: EngineInfo
    model: ModelConfig
    num_graphs: int


def make_core(
    config: Gemma2Config,
    device: str,
    dtype: str,
    *,
    max_seqs: int,
    max_tokens: int,
    step_tokens: int,
    **options: object,
) -> Engine:
    """An engine whose pages hold max_seqs sequences of max_tokens; no prefix cache, graphs captured."""
    with directory(config) as folder:
        model = load_model_config(folder)
        item_bytes = ITEM_BYTES[dtype]
        layout = kv_layout(model, PAGE_TOKENS, item_bytes)
        pages = max_seqs * layout.pages_per_sequence(max_tokens, min(step_tokens, MAX_CHUNK_TOKENS))
        pool_bytes = (pages * SPARE + 1) * layout.page_bytes
        if device == "cuda":
            _need_memory(num_weights(config) * item_bytes + pool_bytes + ACTIVATION_BYTES)
        defaults: dict[str, object] = {
            "model": "random", "device": device, "dtype": dtype, "max_seqs": max_seqs,
            "step_tokens": max(step_tokens, max_seqs), "prefix_caching": False, "page_tokens": PAGE_TOKENS,
            "max_model_len": max_tokens, "kv_cache_gib": pool_bytes / GIB,
            "threads": 1 if device == "cpu" else None,  # a dry run measures nothing
        }  # fmt: skip
        core, info = load_engine(
            EngineConfig(**{**defaults, **options}),  # type: ignore[arg-type]
            folder,
            checkpoint=RandomCheckpoint(),
        )
    num_graphs = core.num_unprepared
    while core.get_ready():  # they are captured while nothing waits for tokens
        pass
    return Engine(core, info, model, num_graphs)


def num_weights(config: Gemma2Config) -> int:
    """Elements of all matrices, the tied embedding once."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def _need_memory(needed: float) -> None:
    """Raises Absent where it is not free: a GPU out of memory may take a phase with it."""
    gc.collect()  # an engine that is done with has cycles
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        raise Absent(f"needs {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} are free")


def random_prompts(vocab: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths, without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


def add(core: EngineCore, prompt: list[int], params: SamplingParams) -> str:
    """Hand a request to the engine. Returns its id."""
    name = f"r{next(numbers)}"
    core.add(GenerateRequest(request_id=name, prompt_ids=prompt, params=params))
    return name


def step(core: EngineCore) -> list[RequestOutput]:
    """One step. Raises AssertionError if the engine gave up a request."""
    outputs, refusals = core.step()
    assert not refusals, f"refused: {refusals[0].error} {refusals[0].message}"
    return outputs


def generate(
    core: EngineCore, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[list[int]]:
    """Run all to their ends, in one batch. Returns their tokens."""
    names = [add(core, prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    while core.has_work:
        for output in step(core):
            tokens[output.request_id] += output.token_ids
    return [tokens[name] for name in names]


def visible_keys(model: ModelConfig, lens: NDArray[np.int64]) -> int:
    """Keys that one query at the end of each sequence sees, summed over sequences and layers."""
    return sum(
        int(np.minimum(lens, model.window).sum() if is_sliding else lens.sum())
        for is_sliding in model.is_sliding
    )


def key_bytes(model: ModelConfig, itemsize: int) -> int:
    """K and V of one token in one layer."""
    return 2 * model.num_kv_heads * model.head_dim * itemsize


def sync(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
