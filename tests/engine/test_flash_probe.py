"""Each thing that flash-attn needs is missed by name, with what was found and what to do."""

import builtins
import inspect
import re
import sys
from types import ModuleType

import fake_flash_attn
import pytest
import torch

from cabochon.engine.attention import Backend
from cabochon.engine.errors import ConfigError
from cabochon.engine.flash_probe import check_flash, settle_page_tokens

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _an_h100(monkeypatch: pytest.MonkeyPatch, fake_flash: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def lacks(
    message: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, head_dim: int = 256
) -> None:
    whole = f"^{re.escape('attention_backend flash-attn needs ' + message)}$"
    with pytest.raises(ConfigError, match=whole):
        check_flash(torch.device(device), dtype, head_dim)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_with_everything_there_nothing_is_said(head_dim: int) -> None:
    check_flash(GPU, torch.bfloat16, head_dim)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_gpus_since_ampere_are_taken(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    check_flash(GPU, torch.bfloat16, 256)


def test_older_gpus_and_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks("an NVIDIA GPU, got cpu: use device cuda if there is one, else torch", device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    lacks("a GPU of compute capability 8.0 or newer, got 7.5: use torch")


def test_a_model_the_library_cannot_compute_is_refused() -> None:
    lacks("dtype bf16, got float32: use bf16, or triton", dtype=torch.float32)
    lacks("heads of at most 256, a multiple of 8, got 512: use triton", head_dim=512)
    lacks("heads of at most 256, a multiple of 8, got 20: use triton", head_dim=20)


def test_a_package_that_is_not_there_or_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flash_attn")
    load = builtins.__import__

    def fail(name: str, *rest: object) -> ModuleType:
        if name == "flash_attn":
            raise ImportError("undefined symbol")
        return load(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", fail)
    lacks("the flash-attn package, got undefined symbol: install cabochon[flash-attn], or use triton")


@pytest.mark.parametrize("version", ["2.7.4", "1.0", "2", "none"])
def test_an_old_package_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(fake_flash_attn, "__version__", version)
    lacks(f"flash-attn 2.8 or newer, got {version}: upgrade it, or use triton")


@pytest.mark.parametrize("version", ["2.8.0.post2", "2.10.1", "3.0"])
def test_newer_packages_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(fake_flash_attn, "__version__", version)
    check_flash(GPU, torch.bfloat16, 256)


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_with_kvcache"])
@pytest.mark.parametrize("missing", ["softcap", "block_table", "window_size"])
def test_a_call_that_takes_no_softcap_pages_or_window_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    signature = inspect.signature(getattr(fake_flash_attn, name))
    kept = [p for p in signature.parameters.values() if p.name != missing]

    def older() -> None:
        """A call that lacks one parameter."""

    older.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    monkeypatch.setattr(fake_flash_attn, name, older)
    lacks(f"{missing} in {name}, got a flash-attn 2.8.3 without: use triton")


@pytest.mark.parametrize(
    ("asked", "backend", "settled"),
    [
        (None, "torch", 16), (None, "triton", 16), (None, "flash-attn", 256),
        (4, "torch", 4), (256, "triton", 256), (512, "flash-attn", 512),
    ],
)  # fmt: skip
def test_pages_have_the_size_asked_for_or_the_backends(
    asked: int | None, backend: Backend, settled: int
) -> None:
    assert settle_page_tokens(asked, backend) == settled


def test_pages_smaller_than_the_library_reads_are_refused() -> None:
    message = (
        "page_tokens must be a multiple of 256 with attention_backend flash-attn, got 16: leave it out for"
        " 256, or use triton"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        settle_page_tokens(16, "flash-attn")
