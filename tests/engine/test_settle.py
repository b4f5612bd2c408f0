"""What `auto` becomes on a machine, and what is refused where it cannot run."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch
import triton

from cabochon.engine import settle
from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.engine.int8_linear import Int8Head, Int8Linear
from cabochon.engine.linear import Fp8Linear, Linear
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.settle import head_of, settle_backend, settle_device, settle_linear


@pytest.mark.parametrize(
    ("asked", "has_gpu", "device"),
    [("auto", False, "cpu"), ("auto", True, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_gpu_must_be_asked_for_and_is_not_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: str,
    has_gpu: bool,
    device: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert settle_device(EngineConfig(device=asked)).type == device  # type: ignore[arg-type]
    assert ("--device cuda" in caplog.text) == (asked == "auto" and has_gpu)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device must be cpu where torch finds no NVIDIA GPU, got cuda"):
        settle_device(EngineConfig(device="cuda"))


@pytest.mark.parametrize(
    ("asked", "device", "backend"),
    [
        ("auto", "cpu", "native"),
        ("auto", "cuda", "triton"),
        ("torch", "cuda", "torch"),
        ("flash-attn", "cuda", "flash-attn"),
    ],
)
def test_auto_says_why_it_chose_a_backend(
    caplog: pytest.LogCaptureFixture, tiny_gemma2_dir: Path, asked: str, device: str, backend: str
) -> None:
    caplog.set_level(logging.INFO, "cabochon")
    config = EngineConfig(attention_backend=asked)  # type: ignore[arg-type]
    assert settle_backend(config, torch.device(device), load_model_config(tiny_gemma2_dir)) == backend
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if asked != "auto" else [f"attention backend={backend} reason={REASONS[device]}"])


REASONS = {"cpu": "no GPU", "cuda": "an NVIDIA GPU, and flash-attn is not measured yet"}


def test_triton_is_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, tiny_gemma2_dir: Path
) -> None:
    model = load_model_config(tiny_gemma2_dir)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="attention_backend must be torch on this cpu"):
        settle_backend(EngineConfig(attention_backend="triton"), torch.device("cpu"), model)


def model_without(reason: str, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    if reason.startswith("no native library"):
        monkeypatch.setattr(settle, "library", lambda: None)
        return config
    return dataclasses.replace(config, head_dim=24)


@pytest.mark.parametrize(
    "reason",
    [
        settle.NO_LIBRARY,
        "a model whose rows or heads are no multiple of 16",
    ],
)
def test_where_native_cannot_run_torch_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_gemma2_dir: Path, reason: str
) -> None:
    caplog.set_level(logging.INFO, "cabochon")
    model = model_without(reason, load_model_config(tiny_gemma2_dir), monkeypatch)
    assert settle_backend(EngineConfig(), torch.device("cpu"), model) == "torch"
    assert [record.getMessage() for record in caplog.records] == [f"attention backend=torch reason={reason}"]
    message = f"attention_backend must be torch with {reason}, got native: use torch"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        settle_backend(EngineConfig(attention_backend="native"), torch.device("cpu"), model)


def test_int8_is_for_a_cpu_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = EngineConfig(quantization="int8")
    with pytest.raises(ConfigError, match=r"none or fp8 on a GPU, got int8 and cuda: use fp8, or"):
        settle_linear(int8, torch.device("cuda"), "bf16")
    monkeypatch.setattr(settle, "library", lambda: None)
    with pytest.raises(ConfigError, match=r"none with no native library: .*, got int8: use none$"):
        settle_linear(int8, torch.device("cpu"), "bf16")
    monkeypatch.undo()
    make_linear = settle_linear(int8, torch.device("cpu"), "fp32")
    assert (make_linear, head_of(make_linear)) == (Int8Linear, Int8Head)
    assert (head_of(Linear), head_of(Fp8Linear)) == (Linear, Fp8Linear)


def test_native_is_refused_on_a_gpu(tiny_gemma2_dir: Path) -> None:
    model = load_model_config(tiny_gemma2_dir)
    with pytest.raises(ConfigError, match="attention_backend must be torch with a cuda, got native"):
        settle_backend(EngineConfig(attention_backend="native"), torch.device("cuda"), model)
