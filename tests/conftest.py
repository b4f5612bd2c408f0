"""Without a GPU the kernels run in Triton's interpreter: the switch must be set before triton is imported."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from random_gemma import SMALL_GEMMA3, random_gemma2, random_gemma3
from tiny_tokenizer import tiny_tokenizer

from cabochon.engine.models.source import locate


@pytest.fixture(scope="session")
def triton_interpreter() -> Iterator[None]:
    """For every test that runs a kernel: from its first one to the end of the session."""
    from triton_interpreter import repaired  # loads triton, which most tests do without

    with repaired():
        yield


@pytest.fixture
def fake_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flash-attn, which needs a GPU, as `fake_flash_attn`; what was imported with it goes again."""
    import fake_flash_attn

    backend = "cabochon.engine.flash_attention"
    real = sys.modules.pop(backend, None)
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    fake_flash_attn.calls.clear()
    yield
    sys.modules.pop(backend, None)
    if real is not None:
        sys.modules[backend] = real


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """Gemma 3 270M, converted once per machine into the default cache."""
    return locate("demo")


@pytest.fixture(scope="session")
def tiny_gemma2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 2 checkpoint of a few kilobytes, with a tokenizer: fp32, window 8."""
    return _save(tmp_path_factory.mktemp("gemma2"), random_gemma2)


@pytest.fixture(scope="session")
def tiny_gemma3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("gemma3"), random_gemma3)


@pytest.fixture(scope="session")
def small_gemma2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For engines on the interpreter, where each head of each token and layer takes 2 ms."""
    return _save(tmp_path_factory.mktemp("small2"), random_gemma2, num_hidden_layers=2)


@pytest.fixture(scope="session")
def small_gemma3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("small3"), random_gemma3, **SMALL_GEMMA3)


@pytest.fixture(scope="session")
def long_gemma2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma 2 with a context of 8192 tokens: its tokenizer takes many for functions."""
    return _save(tmp_path_factory.mktemp("long"), random_gemma2, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def endless_gemma2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma 2 with room for a stream of 60,000 tokens, which outlasts every test."""
    return _save(tmp_path_factory.mktemp("endless"), random_gemma2, max_position_embeddings=65536)


def _save(directory: Path, make: Callable[..., torch.nn.Module], **options: object) -> Path:
    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    model = make(vocab_size=tokenizer.get_vocab_size(), **ids, **options)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
