"""Tiny random Gemma models: transformers' own classes as the oracle, and the same weights in ours."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from cabochon.engine.models.config import ModelConfig

Model = TypeVar("Model", bound=torch.nn.Module)

BASE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,  # neither head_dim nor E / Hq
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}

SMALL_GEMMA3 = {  # for the interpreter: few heads and layers, in three layer groups
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def random_gemma2(seed: int = 0, qk_gain: float = 24.0, **overrides: object) -> Gemma2ForCausalLM:
    """A Gemma 2 whose scores pass the softcap and whose norm weights are not zero."""
    config = Gemma2Config(**{**BASE, **overrides}, attn_implementation="eager")
    return _randomized(Gemma2ForCausalLM(config), seed, qk_gain)


def random_gemma3(seed: int = 0, qk_gain: float = 1.0, **overrides: object) -> Gemma3ForCausalLM:
    """A Gemma 3 with five sliding layers to one global, and one more."""
    config = Gemma3TextConfig(**{**BASE, "num_hidden_layers": 7, **overrides}, attn_implementation="eager")
    return _randomized(Gemma3ForCausalLM(config), seed, qk_gain)


def _randomized(model: Model, seed: int, qk_gain: float) -> Model:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.randn(weight.shape, generator=g) * 0.3)
            else:
                weight.copy_(torch.randn(weight.shape, generator=g) * weight.shape[-1] ** -0.5)
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(qk_gain**0.5)
    return model.eval()


def oracle_logits(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """[len(ids), V], softcapped as transformers returns them."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def oracle_greedy(model: torch.nn.Module, ids: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy continuation, recomputed from scratch for each token: no cache that could be wrong."""
    out = list(ids)
    for _ in range(num_tokens):
        out.append(int(oracle_logits(model, out)[-1].argmax()))
    return out[len(ids) :]


def model_config(hf: Gemma2Config | Gemma3TextConfig) -> ModelConfig:
    """Written by hand, field by field, so that a mistake of the loader's cannot hide here."""
    is_gemma2 = hf.model_type == "gemma2"
    n = hf.num_hidden_layers
    return ModelConfig(
        architecture="Gemma2ForCausalLM" if is_gemma2 else "Gemma3ForCausalLM",
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=n,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        mlp_size=hf.intermediate_size,
        norm_eps=hf.rms_norm_eps,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=50.0 if is_gemma2 else None,
        final_softcap=30.0 if is_gemma2 else None,
        window=hf.sliding_window,
        is_sliding=tuple(i % 2 == 0 if is_gemma2 else (i + 1) % 6 != 0 for i in range(n)),
        rope_theta_sliding=10_000.0,
        rope_theta_global=10_000.0 if is_gemma2 else 1_000_000.0,
        rope_factor_global=1.0,
        has_qk_norm=not is_gemma2,
        max_model_len=hf.max_position_embeddings,
        eos_token_ids=(1,),
        bos_token_id=2,
    )
