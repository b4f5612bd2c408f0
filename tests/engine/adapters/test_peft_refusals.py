"""Every adapter that is refused, once, with its words; and that damage of any kind is refused, too."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_maker import TARGETS, make_adapter
from random_gemma import model_config, random_gemma2
from safetensors.torch import load_file, save_file
from torch import Tensor

from cabochon.engine.adapters import peft_config, peft_format
from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.adapters.peft_format import read_adapter
from cabochon.engine.adapters.tensor_file import MAX_HEADER_BYTES
from cabochon.engine.errors import BadAdapter

MODEL = model_config(random_gemma2().config)
FP32, BF16 = torch.float32, torch.bfloat16
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
NAMED = (
    f"every tensor must be lora_A or lora_B of {', '.join(TARGETS)}, got {{}}: train without it, or merge"
    " it into a"
    " full checkpoint with peft's merge_and_unload"
)


def read(directory: Path, dtype: torch.dtype = FP32, *, max_rank: int = 64) -> Adapter:
    return read_adapter(directory, MODEL, dtype, max_rank=max_rank)


def expect(directory: Path, message: str, *, dtype: torch.dtype = FP32, max_rank: int = 64) -> None:
    with pytest.raises(BadAdapter, match=re.escape(message)) as error:
        read(directory, dtype, max_rank=max_rank)
    assert error.value.param == "lora_path"
    assert re.fullmatch(r".* must .*, .*: .*", str(error.value))


OTHER_OPTIONS = {
    "use_dora": True, "modules_to_save": ["lm_head"], "lora_bias": True, "fan_in_fan_out": True,
    "layer_replication": [[0, 2]], "target_parameters": ["experts.weight"], "trainable_token_indices": [1, 2],
    "use_qalora": True, "loftq_config": {"loftq_bits": 4}, "corda_config": {"corda_method": "ipm"},
    "alora_invocation_tokens": [5], "arrow_config": {"top_k": 2}, "use_bdlora": {"nblocks": 2},
    "megatron_config": {"x": 1}, "an_option_of_tomorrow": 0.5, "a_count": 0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OTHER_OPTIONS.items(), ids=str)
def test_an_option_that_changes_the_model_is_refused_by_name(
    tmp_path: Path, name: str, value: object
) -> None:
    make_adapter(tmp_path, MODEL, 4, **{name: value})
    expect(
        tmp_path,
        f"adapter_config.json must have no options beyond plain LoRA, got {name} = {value}: train without it,"
        " or merge it into a full checkpoint with peft's merge_and_unload",
    )


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "not lora": (
        {"peft_type": "IA3"},
        "peft_type in adapter_config.json must be LORA, got IA3: train a LoRA adapter",
    ),
    "no type": ({"peft_type": None}, "peft_type in adapter_config.json must be LORA, got None"),
    "bias": (
        {"bias": "lora_only"},
        "bias in adapter_config.json must be none, got lora_only: train without it",
    ),
    "pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights in adapter_config.json must leave the base"
        " model as it is, got pissa_niter_4: save with"
        " peft's path_initial_model_for_weight_conversion, or merge",
    ),
    "olora": ({"init_lora_weights": "olora"}, "as it is, got olora"),
    "loftq": ({"init_lora_weights": "loftq"}, "as it is, got loftq"),
    "rank 0": (
        {"r": 0},
        "r in adapter_config.json must be a whole number of at least 1, got 0: save it again",
    ),
    "rank -1": ({"r": -1}, "at least 1, got -1"),
    "rank half": ({"r": 4.0}, "at least 1, got 4.0"),
    "rank true": ({"r": True}, "at least 1, got True"),
    "no rank": ({"r": None}, "at least 1, got None"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha in adapter_config.json must be a finite number, got 16"),
    "alpha true": ({"lora_alpha": True}, "must be a finite number, got True"),
    "alpha nan": ({"lora_alpha": math.nan}, "must be a finite number, got nan"),
    "alpha inf": ({"lora_alpha": -math.inf}, "must be a finite number, got -inf"),
    "alpha huge": ({"lora_alpha": 10**400}, "must be a finite number, got 1000"),
    "rank differs": (
        {"r": 8},
        ".lora_A.weight must have rank 8 by adapter_config.json, its shape is [4, 96]:"
        " configuration and tensors are of different trainings, save both again",
    ),
    "rank pattern": (
        {"rank_pattern": {"q_proj": 2}},
        "lora_A.weight must have rank 2 by adapter_config.json",
    ),
    "pattern no map": (
        {"rank_pattern": ["q_proj"]},
        "rank_pattern in adapter_config.json must map at most 1024 names of modules, or plain regular"
        " expressions"
        " of at most 512 characters, to numbers, it does not: use names of modules",
    ),
    "patterns many": (
        {"rank_pattern": {f"layers.{i}.x": 1 for i in range(1025)}},
        "must map at most 1024 names",
    ),
    "pattern recurses": (
        {"alpha_pattern": {"(?R)": 4}},
        "alpha_pattern in adapter_config.json must map at most",
    ),
    "pattern repeats": (
        {"alpha_pattern": {"(a{999}){999}": 4}},
        "alpha_pattern in adapter_config.json must map",
    ),
    "pattern value": (
        {"rank_pattern": {"q_proj": "4"}},
        "each value of rank_pattern in adapter_config.json must be a"
        " whole number of at least 1, got 4: save it again",
    ),
    "pattern long": ({"alpha_pattern": {"x" * 513: 4}}, "plain regular expressions of at most 512"),
    "pattern bad": (
        {"alpha_pattern": {"(": 4}},
        "must be names of modules or plain regular expressions, one is no valid one: correct it",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_we_do_not_follow_is_refused(tmp_path: Path, name: str) -> None:
    change, message = CONFIGS[name]
    expect(make_adapter(tmp_path, MODEL, 4, **change), message)


def test_patterns_that_take_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_config, "MATCHING_S", 0.02)
    make_adapter(tmp_path, MODEL, 4, alpha_pattern={"(.*|.*|.*)" * 40 + "q": 4})
    expect(tmp_path, "must be matched within 0.02 s, they take longer: use names of modules")


def tensor(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "inputs": (
        {f"{Q0}.lora_A.weight": tensor(4, 65)},
        f"{Q0}.lora_A.weight must be [4, 64] on this model, got [4, 65]:"
        " it was trained on tests/random-gemma, serve that model",
    ),
    "outputs": (
        {f"{Q0}.lora_B.weight": tensor(63, 4)},
        f"{Q0}.lora_B.weight must be [64, 4] on this model, got [63, 4]",
    ),
    "dimensions": (
        {f"{Q0}.lora_A.weight": tensor(4, 64, 1)},
        "must be [4, 64] on this model, got [4, 64, 1]",
    ),
    "rank": (
        {f"{Q0}.lora_B.weight": tensor(64, 5)},
        "must have rank 4 by adapter_config.json, its shape is [64, 5]",
    ),
    "layer": (
        {"base_model.model.model.layers.4.mlp.up_proj.lora_A.weight": tensor(4, 64)},
        "layers must be below 4 on"
        " this model, got base_model.model.model.layers.4.mlp.up_proj.lora_A.weight: it was trained on"
        " tests/",
    ),
    "no B": (
        {f"{Q0}.lora_B.weight": None},
        "each module must have lora_A and lora_B, model.layers.0.self_attn.q_proj"
        " has lora_A alone: save the adapter again",
    ),
    "no A": ({f"{Q0}.lora_A.weight": None}, "has lora_B alone"),
    "twice": ({f"{Q0}.lora_A.default.weight": tensor(4, 64)}, "is there twice: save the adapter again"),
    "two modules": (
        {
            f"base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight": value
            for matrix, value in (("A", tensor(4, 64)), ("B", tensor(64, 4)))
        },
        "layers.0.self_attn.q_proj is there twice: save",
    ),
    "nan": (
        {f"{Q0}.lora_A.weight": tensor(4, 64) * math.nan},
        "values must be finite, those of model.layers.0.self_attn"
        ".q_proj are not (scaled, and in float32): its training diverged, take an earlier checkpoint",
    ),
    "infinity": ({f"{Q0}.lora_B.weight": tensor(64, 4) * -math.inf}, "values must be finite"),
    "integers": (
        {f"{Q0}.lora_A.weight": tensor(4, 64, dtype=torch.int32)},
        f"tensors must be F64, F32, F16, BF16, {Q0}.lora_A.weight is I32: save it in one of these",
    ),
    "fp8": ({f"{Q0}.lora_A.weight": tensor(4, 64).to(torch.float8_e4m3fn)}, "lora_A.weight is F8_E4M3"),
}
for unknown in (
    "base_model.model.lm_head.lora_A.weight",
    "base_model.model.lm_head.weight",
    "base_model.model.model.embed_tokens.lora_embedding_A",
    f"{Q0}.lora_magnitude_vector",
    f"{Q0}.lora_B.bias",
    "base_model.model.score.modules_to_save.weight",
    "base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight",
):
    TENSORS[unknown] = ({unknown: tensor(4, 64)}, NAMED.format(unknown))


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_this_model_has_no_place_for_are_refused(tmp_path: Path, name: str) -> None:
    change, message = TENSORS[name]
    make_adapter(tmp_path, MODEL, 4)
    tensors = load_file(tmp_path / WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHTS)
    expect(tmp_path, message)


def test_an_adapter_of_another_model_is_refused_by_its_name(tmp_path: Path) -> None:
    other = model_config(random_gemma2(hidden_size=48).config)
    make_adapter(tmp_path, other, 4, targets=("v_proj",), base_model_name_or_path="google/gemma-3-1b-it")
    expect(tmp_path, "got [4, 48]: it was trained on google/gemma-3-1b-it, serve that model")
    make_adapter(tmp_path, other, 4, targets=("v_proj",), base_model_name_or_path=None)
    expect(tmp_path, "got [4, 48]: it was trained on another model, serve that one")


def test_no_module_at_all_is_refused(tmp_path: Path) -> None:
    expect(
        make_adapter(tmp_path, MODEL, 4, targets=()),
        f"an adapter must have lora_A and lora_B of {', '.join(TARGETS)}",
    )


def test_a_rank_above_the_slots_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, MODEL, 9)
    assert read(tmp_path, max_rank=9).rank == 9
    message = (
        "ranks must be at most max_lora_rank = 8, model.layers.0.mlp.down_proj has 9: raise max_lora_rank"
    )
    expect(tmp_path, message, max_rank=8)


def test_values_that_overflow_once_scaled_are_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, MODEL, 4, alpha=1e29, std=1e10)
    expect(tmp_path, "are not (scaled, and in float32)")


def test_values_that_only_fp32_holds_are_refused_in_bf16(tmp_path: Path) -> None:
    make_adapter(tmp_path, MODEL, 4, alpha=4)
    largest = torch.finfo(FP32).max
    tensors = load_file(tmp_path / WEIGHTS) | {f"{Q0}.lora_B.weight": tensor(64, 4) * largest}
    save_file(tensors, tmp_path / WEIGHTS)
    assert read(tmp_path).layers[0]["qkv"].b.max() == largest
    expect(tmp_path, "are not (scaled, and in bfloat16)", dtype=BF16)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    expect(
        tmp_path / "none",
        f"an adapter's directory must have {CONFIG}, {tmp_path}/none has none: give one that peft",
    )
    make_adapter(tmp_path, MODEL, 4)
    (tmp_path / WEIGHTS).unlink()
    expect(
        tmp_path, f"an adapter's directory must have {WEIGHTS}, {tmp_path} has none: give one that peft saved"
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    expect(
        tmp_path,
        f"must be in {WEIGHTS}, {tmp_path} has adapter_model.bin alone, a pickle, which may run any code:"
        " convert it where you trust it, by PeftModel.from_pretrained and save_pretrained",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", f"{CONFIG} must be JSON, it is not: save it or copy it again"),
        (b"\xff\xfe", f"{CONFIG} must be JSON"),
        (b"[" * 100_000, f"{CONFIG} must be JSON"),
        (b"[]", f"{CONFIG} must be a JSON object of at most 1048576 bytes, it is not: save it again"),
        (b"{" + b" " * (1 << 20) + b"}", f"{CONFIG} must be a JSON object of at most 1048576 bytes"),
    ],
    ids=["truncated", "not utf-8", "deep", "a list", "huge"],
)
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    make_adapter(tmp_path, MODEL, 4)
    (tmp_path / CONFIG).write_bytes(content)
    expect(tmp_path, message)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_that_cannot_be_opened_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_adapter(tmp_path, MODEL, 4)
    real = Path.open

    def deny(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", deny)
    expect(tmp_path, "Permission denied")


def test_words_of_the_file_are_shown_short_and_on_one_line(tmp_path: Path) -> None:
    make_adapter(tmp_path, MODEL, 4, lora_alpha="a\nb\ud800" + "c" * 10_000)
    with pytest.raises(BadAdapter) as error:
        read(tmp_path)
    assert f"got a?b?{'c' * 96}…: save it again" in str(error.value)


def header(**tensors: Any) -> bytes:
    content = json.dumps(tensors).encode()
    return len(content).to_bytes(8, "little") + content


A0 = f"{Q0}.lora_A.weight"
WHOLE = "adapter_model.safetensors must be a whole safetensors file, it is not ({}): save or copy it again"
FILES = {
    "empty": (b"", "0 bytes, truncated in its header"),
    "length alone": (b"\x10\0\0\0\0\0\0\0", "8 bytes, truncated in its header"),
    "header beyond the end": ((1 << 62).to_bytes(8, "little") + b"{}", "10 bytes, truncated in its header"),
    "header not json": (b"\2\0\0\0\0\0\0\0{x", "its header is not JSON"),
    "header deep": ((100_000).to_bytes(8, "little") + b"[" * 100_000, "its header is not JSON"),
    "header a list": (b"\2\0\0\0\0\0\0\0[]", "its header is no object"),
    "entry no object": (header(x=3), "its header has a tensor whose bytes do not fit its shape"),
    "bytes too few": (
        header(**{A0: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1020]}}) + bytes(1020),
        "its header has a tensor whose bytes do not fit its shape",
    ),
    "backwards": (header(x={"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}), "do not fit its shape"),
    "before the start": (
        header(x={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}),
        "do not fit its shape",
    ),
    "negative": (
        header(x={"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}) + bytes(4),
        "do not fit",
    ),
    "terabytes": (
        header(**{A0: {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}),
        "where its header says",
    ),
    "huge numbers": (
        header(x={"dtype": "F32", "shape": [10**4000] * 9, "data_offsets": [0, 4]}) + bytes(4),
        "do not fit",
    ),
    "more than it says": (
        header(**{A0: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(5),
        "bytes where its header says",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lies_is_refused_and_takes_no_memory(tmp_path: Path, name: str) -> None:
    content, found = FILES[name]
    make_adapter(tmp_path, MODEL, 4)
    (tmp_path / WEIGHTS).write_bytes(content)
    expect(tmp_path, found)
    expect(tmp_path, "adapter_model.safetensors must be a whole safetensors file, it is not (")


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    make_adapter(tmp_path, MODEL, 4)
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate((1 << 40) + 8)  # a hole: it takes no room on disk
    expect(tmp_path, WHOLE.format(f"a header of {1 << 40} bytes, more than {MAX_HEADER_BYTES}"))


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library's mapping would end the process."""
    make_adapter(tmp_path, MODEL, 4)
    real = peft_format._match

    def match_and_truncate(*args: Any) -> Any:
        with (tmp_path / WEIGHTS).open("r+b") as file:
            file.truncate(10_000)
        return real(*args)

    monkeypatch.setattr(peft_format, "_match", match_and_truncate)
    expect(tmp_path, WHOLE.format("it shrank while it was read"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("good"), MODEL, 2, layers=(0,), dtype=BF16)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_nothing_but_bad_adapter(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(good, damaged, dirs_exist_ok=True)
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray((good / name).read_bytes())
    interesting = len(content) if name == CONFIG else 2500  # most of a file is values, which may be any
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, interesting - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (damaged / name).write_bytes(content)
    try:
        adapter = read(damaged, BF16)
    except BadAdapter as error:
        str(error).encode()  # an answer's words must be UTF-8
    else:
        assert all(t.isfinite().all() for layer in adapter.layers for delta in layer.values() for t in delta)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


NUMBERS = "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"
WORDS = "bias", "target_modules", "base_model_name_or_path", "peft_type", "init_lora_weights", "another"
offsets = st.lists(st.integers(-1, 600), max_size=3)
dtypes = st.sampled_from(["F32", "BF16", "I8", 3])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(st.sampled_from([*NUMBERS, *WORDS]), json_values),
    entry=st.none()
    | st.fixed_dictionaries(
        {"dtype": dtypes, "shape": json_values, "data_offsets": offsets | json_values},
    ),
)
def test_any_json_raises_nothing_but_bad_adapter(
    good: Path, tmp_path: Path, config: dict[str, Any], entry: dict[str, Any] | None
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(good, damaged, dirs_exist_ok=True)
    (damaged / CONFIG).write_text(json.dumps(json.loads((good / CONFIG).read_text()) | config))
    if entry is not None:
        raw = (good / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        (damaged / WEIGHTS).write_bytes(header(**json.loads(raw[8:end]) | {A0: entry}) + raw[end:])
    try:
        read(damaged, BF16)
    except BadAdapter as error:
        str(error).encode()
