"""`cabochon adapters` as a process: what it says of each adapter, and its exit code."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_maker import make_adapter
from random_gemma import model_config
from transformers import Gemma2Config

from cabochon.engine.adapters.adapter import slot_bytes
from cabochon.engine.adapters.peft_format import read_adapter
from cabochon.engine.adapters.show import find_adapters, main
from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.engine.models.hf_config import load_model_config


def adapters(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    command = [sys.executable, "-m", "cabochon.server.cli", "adapters", *map(str, args)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("CABOCHON_")}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100, check=False)
    return run.returncode, run.stdout, run.stderr


def test_each_adapter_is_described_and_a_refused_one_is_an_exit_code(
    tiny_gemma2_dir: Path, tmp_path: Path
) -> None:
    model = load_model_config(tiny_gemma2_dir)
    served = f"google/{tiny_gemma2_dir.name}"
    make_adapter(tmp_path / "plain", model, 8, targets=("q_proj", "up_proj"), base_model_name_or_path=served)
    make_adapter(tmp_path / "team" / "root", model, 16, alpha=12, rslora=True, alpha_pattern={"q_proj": 1})
    make_adapter(tmp_path / "wide", model, 128, base_model_name_or_path=None)
    (tmp_path / "no-adapter").mkdir()
    code, out, err = adapters(
        "--lora-dir", tmp_path, "--model", tiny_gemma2_dir, "--dtype", "fp32", "--max-loras", 3
    )
    assert (code, err) == (1, "")
    head, plain, root, wide, last = out.split("\n\n")
    each = slot_bytes(model, 64, itemsize=4)
    assert f"slots 3 of rank 64, on a GPU {each / 1e6:.1f} MB each, {3 * each / 1e6:.1f} MB together" in head
    assert f"model {tiny_gemma2_dir} (Gemma2ForCausalLM, fp32)" in head
    num_bytes = read_adapter(tmp_path / "plain", model, torch.float32, max_rank=8).num_bytes
    assert plain.splitlines() == [
        "plain: OK",
        "  rank        8",
        "  scaling     2 = 16 / 8",
        "  modules     q_proj, up_proj",
        f"  base model  {served} (the name of the model served)",
        f"  bytes       {num_bytes / 1e6:.1f} MB",
    ]
    assert root.startswith(
        "team/root: OK\n  rank        16\n  scaling     3 = 12 / √16, others by rank_pattern and"
    )
    assert "  base model  tests/random-gemma (not the name of the model served)" in root
    assert wide.startswith("wide: REFUSED\n  ranks must be at most max_lora_rank = 64, ")
    assert last.startswith("2 of 3 can be served, ")


def test_paths_come_first_and_all_fine_is_0(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    """A configuration is enough: whoever checks an adapter need not have the weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((tiny_gemma2_dir / "config.json").read_bytes())
    adapter = make_adapter(
        tmp_path / "x", load_model_config(tiny_gemma2_dir), 4, base_model_name_or_path=None
    )
    code, out, err = adapters(adapter, "--model", tmp_path / "model", "--lora-dir", "/nowhere")
    assert (code, err) == (0, "")
    assert "x: OK" in out
    assert "  base model  not named" in out


@pytest.mark.parametrize(
    ("model_type", "paths", "code", "message"),
    [
        (
            None,
            [],
            2,
            "adapters must be named by paths, lora_modules, merge_lora or lora_dir, got none of them:",
        ),
        ("llama", ["x"], 1, "model_type must be one of"),
    ],
)
def test_what_stops_it_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_type: str | None,
    paths: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = dataclasses.asdict(EngineConfig(model=str(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["show", json.dumps(config), *paths])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (code, "")
    assert err.startswith(f"cabochon: {message}")
    assert err.count("\n") == 1


def test_adapters_come_from_every_option_that_names_some(tmp_path: Path) -> None:
    for name in ("b", "a/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").touch()
    config = EngineConfig(lora_modules=("x=/x",), merge_lora="y=/y", lora_dir=str(tmp_path))
    names = ["x", "y", "a/deep", "b"]
    assert [(name, str(path)) for name, path in find_adapters(config, [])] == [
        *zip(names, ["/x", "/y", f"{tmp_path}/a/deep", f"{tmp_path}/b"], strict=True)
    ]
    assert find_adapters(EngineConfig(lora_dir=str(tmp_path / "b" / "none")), []) == []
    with pytest.raises(ConfigError):
        find_adapters(EngineConfig(), [])


def test_a_slot_is_as_large_as_an_adapter_of_all_modules(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    model = load_model_config(tiny_gemma3_dir)
    for dtype in (torch.float32, torch.bfloat16):
        adapter = read_adapter(make_adapter(tmp_path, model, 6), model, dtype, max_rank=6)
        assert adapter.num_bytes == slot_bytes(model, 6, dtype.itemsize)


def test_the_bytes_of_gemma_2_2b_by_hand() -> None:
    """E 2304, 8 heads and 4 for keys of 256, F 9216, 26 layers."""
    sizes = {
        "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "intermediate_size": 9216, "num_hidden_layers": 26,
    }  # fmt: skip
    qkv, out = 3 * 2304 + 4096, 2048 + 2304
    gate_up, down = 2 * 2304 + 2 * 9216, 9216 + 2304
    assert slot_bytes(model_config(Gemma2Config(**sizes)), 8, 2) == 26 * 8 * 2 * (qkv + out + gate_up + down)
