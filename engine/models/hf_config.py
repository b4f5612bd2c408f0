"""Reads config.json through transformers' configuration classes; refuses by name what we do not run."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Gemma2Config, Gemma3TextConfig

from cabochon.engine.errors import BadCheckpoint, UnsupportedModel
from cabochon.engine.models.config import ModelConfig

CLASSES: dict[str, Any] = {"gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}
SUPPORTED = "Gemma 2 (model_type gemma2) and Gemma 3 text (gemma3_text)"
GELU_TANH = "gelu_pytorch_tanh"
LAYER_TYPES = {"sliding_attention", "full_attention"}


def load_model_config(directory: Path) -> ModelConfig:
    """Raises UnsupportedModel or BadCheckpoint."""
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise BadCheckpoint(f"a model directory must have config.json, {directory} has none: complete it")
    model_type = str(raw.get("model_type"))
    if model_type not in CLASSES:
        raise UnsupportedModel(
            f"model_type must be one of {SUPPORTED}, this checkpoint's is {model_type} ({_names(raw)}):"
            " choose another model"
        )
    try:
        config = CLASSES[model_type].from_dict(raw)
    except (StrictDataclassError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise BadCheckpoint(
            f"config.json must be a valid {model_type} configuration, it is not"
            f" ({' '.join(str(error).split())}): download it again"
        ) from error
    _refuse_what_we_do_not_run(config, raw)
    generation = _read_json(directory / "generation_config.json") or {}
    return _translate(config, model_type, generation)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{path.name} must be JSON, it is not ({error}): download it again") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path.name} must be a JSON object: download it again")
    return content


def _names(raw: dict[str, Any]) -> str:
    return ", ".join(raw.get("architectures") or ["no architecture named"])


def _refuse_what_we_do_not_run(config: Any, raw: dict[str, Any]) -> None:
    for name, is_fine, wanted in (
        ("quantization_config", not raw.get("quantization_config"), "absent: weights in bf16, fp16 or fp32"),
        ("hidden_activation", config.hidden_activation == GELU_TANH, GELU_TANH),
        ("attention_bias", not config.attention_bias, "false"),
        ("tie_word_embeddings", config.tie_word_embeddings, "true: the output head is the embedding"),
        ("use_bidirectional_attention", not getattr(config, "use_bidirectional_attention", None), "false"),
        ("layer_types", LAYER_TYPES.issuperset(config.layer_types), " or ".join(sorted(LAYER_TYPES))),
        (
            "sliding_window",
            isinstance(config.sliding_window, int) and config.sliding_window > 0,
            "a positive number",
        ),
    ):
        if not is_fine:
            given = raw.get(name, getattr(config, name, None))
            if isinstance(given, dict):
                given = given.get("quant_method", "an object")
            elif isinstance(given, list):
                given = ", ".join(dict.fromkeys(given))
            raise UnsupportedModel(
                f"{name} must be {wanted}, this checkpoint has {given}: choose another model"
            )


def _translate(config: Any, model_type: str, generation: dict[str, Any]) -> ModelConfig:
    is_gemma3 = model_type == "gemma3_text"
    sliding, full = _rope(config, "sliding_attention"), _rope(config, "full_attention")
    _refuse_scaling(sliding, "sliding", "default")
    _refuse_scaling(full, "global", "default", "linear")
    eos = [*_as_list(config.eos_token_id), *_as_list(generation.get("eos_token_id"))]
    return ModelConfig(
        architecture="Gemma3ForCausalLM" if is_gemma3 else "Gemma2ForCausalLM",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        final_softcap=config.final_logit_softcapping,
        window=config.sliding_window,
        is_sliding=tuple(kind == "sliding_attention" for kind in config.layer_types),
        rope_theta_sliding=float(sliding["rope_theta"]),
        rope_theta_global=float(full["rope_theta"]),
        rope_factor_global=float(full["factor"]) if full.get("rope_type") == "linear" else 1.0,
        has_qk_norm=is_gemma3,
        max_model_len=config.max_position_embeddings,
        # An id that no token has ends nothing
        eos_token_ids=tuple(one for one in dict.fromkeys(eos) if 0 <= one < config.vocab_size),
        bos_token_id=config.bos_token_id,
    )


def _rope(config: Any, kind: str) -> dict[str, Any]:
    """transformers 5 keeps one set of parameters (Gemma 2) or one per kind of layer (Gemma 3)."""
    parameters: dict[str, Any] = config.rope_parameters
    of_kind: dict[str, Any] = parameters.get(kind, parameters)
    return of_kind


def _refuse_scaling(rope: dict[str, Any], layers: str, *allowed: str) -> None:
    """Gemma 2 has one set of parameters: to scale its global layers is to scale its sliding ones, too."""
    kind = rope.get("rope_type", "default")
    if kind not in allowed:
        raise UnsupportedModel(
            f"rope_type must be {' or '.join(allowed)} in {layers} layers, this checkpoint has {kind}:"
            " choose another model"
        )


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
