"""config.json as it lies on the Hub, translated; all that we would run wrongly is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from random_gemma import model_config, random_gemma2, random_gemma3

from cabochon.engine.errors import BadCheckpoint, UnsupportedModel
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.hf_config import load_model_config

# As google/gemma-2-2b-it published it: no layer_types, no rope_parameters, two names for the activation.
GEMMA_2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA_2_9B = GEMMA_2_2B | {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "sliding_window_size": 4096,
}
GEMMA_2_27B = GEMMA_2_2B | {
    "head_dim": 128,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
}
GEMMA_3_270M: dict[str, Any] = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
# The text half of google/gemma-3-4b-it: most values are the class's defaults and were left out.
GEMMA_3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}

EXPECTED_2_2B = ModelConfig(
    architecture="Gemma2ForCausalLM",
    vocab_size=256_000,
    hidden_size=2304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_size=9216,
    norm_eps=1e-6,
    attention_scale=1 / 16,
    attention_softcap=50.0,
    final_softcap=30.0,
    window=4096,
    is_sliding=(True, False) * 13,
    rope_theta_sliding=10_000.0,
    rope_theta_global=10_000.0,
    rope_factor_global=1.0,
    has_qk_norm=False,
    max_model_len=8192,
    eos_token_ids=(1, 107),
    bos_token_id=2,
)
EXPECTED_2_9B = dataclasses.replace(
    EXPECTED_2_2B,
    hidden_size=3584,
    num_layers=42,
    num_heads=16,
    num_kv_heads=8,
    mlp_size=14336,
    is_sliding=(True, False) * 21,
)
EXPECTED_2_27B = dataclasses.replace(
    EXPECTED_2_2B,
    hidden_size=4608,
    num_layers=46,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    mlp_size=36864,
    attention_scale=1 / 12,
    is_sliding=(True, False) * 23,
)
EXPECTED_3_270M = ModelConfig(
    architecture="Gemma3ForCausalLM",
    vocab_size=262_144,
    hidden_size=640,
    num_layers=18,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    mlp_size=2048,
    norm_eps=1e-6,
    attention_scale=1 / 16,
    attention_softcap=None,
    final_softcap=None,
    window=512,
    is_sliding=(True, True, True, True, True, False) * 3,
    rope_theta_sliding=10_000.0,
    rope_theta_global=1_000_000.0,
    rope_factor_global=1.0,
    has_qk_norm=True,
    max_model_len=32_768,
    eos_token_ids=(1,),
    bos_token_id=2,
)
EXPECTED_3_4B = dataclasses.replace(
    EXPECTED_3_270M,
    vocab_size=262_208,
    hidden_size=2560,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    mlp_size=10240,
    window=1024,
    is_sliding=(*(True, True, True, True, True, False) * 5, True, True, True, True),
    rope_factor_global=8.0,
    max_model_len=131_072,
)


def write(directory: Path, config: dict[str, Any], **changes: object) -> Path:
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(GEMMA_2_2B, EXPECTED_2_2B, id="gemma-2-2b"),
        pytest.param(GEMMA_2_9B, EXPECTED_2_9B, id="gemma-2-9b"),
        pytest.param(GEMMA_2_27B, EXPECTED_2_27B, id="gemma-2-27b"),
        pytest.param(GEMMA_3_270M, EXPECTED_3_270M, id="gemma-3-270m"),
        pytest.param(GEMMA_3_4B, EXPECTED_3_4B, id="gemma-3-4b"),
    ],
)
def test_published_configurations_translate(
    tmp_path: Path, config: dict[str, Any], expected: ModelConfig
) -> None:
    assert load_model_config(write(tmp_path, config)) == expected


@pytest.mark.parametrize(
    "left_out", ["attn_logit_softcapping", "final_logit_softcapping", "rope_theta", "head_dim", "hidden_act"]
)
def test_values_that_the_first_checkpoints_left_out_are_the_defaults(tmp_path: Path, left_out: str) -> None:
    shorter = {key: value for key, value in GEMMA_2_2B.items() if key != left_out}
    assert load_model_config(write(tmp_path, shorter)) == EXPECTED_2_2B


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
def test_what_todays_transformers_saves_translates(tmp_path: Path, make: Any) -> None:
    hf = make(eos_token_id=1, bos_token_id=2)
    hf.config.save_pretrained(tmp_path)
    assert load_model_config(tmp_path) == model_config(hf.config)


def test_an_unusual_pattern_of_layers_is_kept(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = load_model_config(write(tmp_path, GEMMA_2_2B, layer_types=kinds, num_hidden_layers=3))
    assert config.is_sliding == (False, True, True)


def test_gemma3_of_another_pattern_and_theta_translates(tmp_path: Path) -> None:
    directory = write(
        tmp_path,
        GEMMA_3_4B,
        num_hidden_layers=5,
        sliding_window_pattern=2,
        rope_theta=500_000.0,
        rope_local_base_freq=20_000.0,
    )
    config = load_model_config(directory)
    assert config.is_sliding == (True, False, True, False, True)
    assert (config.rope_theta_sliding, config.rope_theta_global) == (20_000.0, 500_000.0)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (1, None, (1,)),
        (1, 1, (1,)),
        (1, [1, 107], (1, 107)),
        ([1, 107], 1, (1, 107)),
        ([1], [106], (1, 106)),
        (None, [1, 107], (1, 107)),
        (None, None, ()),
    ],
)
def test_eos_ids_of_both_files_are_merged(
    tmp_path: Path, in_config: object, in_generation: object, expected: tuple[int, ...]
) -> None:
    write(tmp_path, GEMMA_2_2B, eos_token_id=in_config)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert load_model_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("gemma", "GemmaForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("gemma3n", "Gemma3nForConditionalGeneration"),
        ("paligemma", "PaliGemmaForConditionalGeneration"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, model_type: str, architecture: str) -> None:
    write(tmp_path, GEMMA_2_2B, model_type=model_type, architectures=[architecture])
    message = (
        r"model_type must be one of Gemma 2 \(model_type gemma2\) and Gemma 3 text \(gemma3_text\),"
        rf" this checkpoint's is {model_type} \({architecture}\): choose another model"
    )
    with pytest.raises(UnsupportedModel, match=message):
        load_model_config(tmp_path)


@pytest.mark.parametrize("model_type", [None, ["gemma2"], 2], ids=str)
def test_a_model_type_that_is_no_name_is_refused(tmp_path: Path, model_type: object) -> None:
    write(tmp_path, GEMMA_2_2B, model_type=model_type, architectures=None)
    with pytest.raises(UnsupportedModel, match=r"this checkpoint's is .+ \(no architecture named\)"):
        load_model_config(tmp_path)


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0}
CHUNKED = [*["sliding_attention", "full_attention"] * 12, "chunked_attention", "full_attention"]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            GEMMA_2_2B,
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantization_config must be absent: weights in bf16, fp16 or fp32,"
            " this checkpoint has bitsandbytes",
        ),
        (GEMMA_2_2B, {"quantization_config": {"bits": 4}}, "quantization_config .+ has an object"),
        (
            GEMMA_2_2B,
            {"hidden_activation": "silu"},
            "hidden_activation must be gelu_pytorch_tanh, this checkpoint has silu",
        ),
        (GEMMA_2_2B, {"hidden_activation": "gelu"}, "hidden_activation must be .+ has gelu"),
        (GEMMA_3_270M, {"attention_bias": True}, "attention_bias must be false, this checkpoint has True"),
        (GEMMA_2_2B, {"tie_word_embeddings": False}, "tie_word_embeddings must be true: the output head is"),
        (GEMMA_3_270M, {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
        (GEMMA_3_270M, {"sliding_window": None}, "sliding_window must be a positive number, .+ has None"),
        (GEMMA_2_2B, {"sliding_window": 0}, "sliding_window must be a positive number, .+ has 0"),
        (
            GEMMA_2_2B,
            {"layer_types": CHUNKED},
            "layer_types must be full_attention or sliding_attention, this checkpoint has sliding_attention,"
            " full_attention, chunked_attention",
        ),
        (
            GEMMA_3_270M,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type must be default or linear in global layers, this checkpoint has dynamic",
        ),
        (
            GEMMA_3_270M,
            {"rope_parameters": {"sliding_attention": LINEAR, "full_attention": DEFAULT}},
            "rope_type must be default in sliding layers, this checkpoint has linear",
        ),
        (
            GEMMA_3_270M,
            {"rope_parameters": {"sliding_attention": YARN, "full_attention": DEFAULT}},
            "rope_type must be default in sliding layers, this checkpoint has yarn",
        ),
        # One set of parameters for all layers: the sliding ones would be scaled as well.
        (
            GEMMA_2_2B,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type must be default in sliding layers, this checkpoint has linear",
        ),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)
def test_what_we_do_not_run_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"{message}.*: choose another model"):
        load_model_config(write(tmp_path, config, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "large"},
        {"hidden_size": 2305},
        {"hidden_activation": None},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["no such attention"] * 26},
        {"eos_token_id": "<eos>"},
        {"torch_dtype": "int9"},
        {"rope_scaling": {"rope_type": "linear"}},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_refuses_is_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    message = r"^config\.json must be a valid gemma2 configuration, it is not \(.+\): download it again$"
    with pytest.raises(BadCheckpoint, match=message):
        load_model_config(write(tmp_path, GEMMA_2_2B, **changes))


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    message = rf"a model directory must have config\.json, {tmp_path} has none: complete it"
    with pytest.raises(BadCheckpoint, match=message):
        load_model_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"version https://git-lfs", b'{"a": "\xff"}'], ids=str)
def test_a_file_that_is_not_json_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (write(tmp_path, GEMMA_2_2B) / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=rf"^{name} must be JSON, it is not \(.+\): download it again"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "null", '"gemma2"', "2"])
def test_json_that_is_no_object_is_named(tmp_path: Path, name: str, content: str) -> None:
    (write(tmp_path, GEMMA_2_2B) / name).write_text(content)
    with pytest.raises(BadCheckpoint, match=rf"^{name} must be a JSON object: download it again"):
        load_model_config(tmp_path)
