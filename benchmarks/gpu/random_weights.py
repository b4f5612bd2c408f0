"""Gemma 2 of true shapes with random weights, seeded and made on the device: ours and transformers' alike.

Every tensor is rounded to bf16 first, so that fp32 and bf16 models have the same weights. Activations stay
sane: matrices keep the variance, scores reach the softcap's bend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from cabochon.engine.models.checkpoint import CPU, Checkpoint

QK_GAIN = 8.0  # standard deviation of scores: the largest of 1,000 loses 8 % to the cap of 50
NORM_SPREAD = 0.3
COMMON = {
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "vocab_size": 256_000,
    "rms_norm_eps": 1e-6,
}
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "query_pre_attn_scalar",
)
SIZES: dict[str, dict[str, Any]] = {
    "2b": {**dict(zip(NAMES, (2304, 9216, 26, 8, 4, 256, 256), strict=True)), **COMMON},
    "9b": {**dict(zip(NAMES, (3584, 14336, 42, 16, 8, 256, 256), strict=True)), **COMMON},
    "27b": {**dict(zip(NAMES, (4608, 36864, 46, 32, 16, 128, 144), strict=True)), **COMMON},
    "tiny": {
        **dict(zip(NAMES, (64, 96, 4, 4, 2, 16, 24), strict=True)), **COMMON,
        "vocab_size": 512, "sliding_window": 24, "max_position_embeddings": 512,
    },
}  # fmt: skip


def configuration(size: str, **overrides: object) -> Gemma2Config:
    """transformers' configuration of a size, softcaps as Gemma 2's."""
    return Gemma2Config(**{**SIZES[size], **overrides}, eos_token_id=1, bos_token_id=2, pad_token_id=0)


@contextmanager
def directory(config: Gemma2Config) -> Iterator[Path]:
    """A model directory without weights."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        yield Path(folder)


def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of that name: the same on every call, on one kind of device."""
    g = torch.Generator(device).manual_seed(crc32(name.encode()))
    made = torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16)
    spread = NORM_SPREAD if "norm" in name else shape[-1] ** -0.5
    if "q_proj" in name or "k_proj" in name:
        spread *= QK_GAIN**0.5
    return made.mul_(spread).to(dtype)


class RandomCheckpoint(Checkpoint):
    """Has every tensor that is asked for."""

    def __init__(self) -> None:
        self.num_elements = 0  # nobody watches it load

    def load(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
    ) -> Tensor:
        """See `tensor`."""
        return tensor(name, shape, dtype, device)

    def close(self) -> None:
        """Nothing is open."""


def oracle(config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model with the same weights, and eager attention: the one that knows the softcap."""
    config._attn_implementation = "eager"
    with torch.device(device):
        model = Gemma2ForCausalLM._from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensor(name, tuple(weight.shape), weight.dtype, weight.device))
    return model.eval()
