"""What the `flash-attn` backend needs, asked for once and before anything is loaded, and its size of pages.

The package is imported only where the backend was asked for.
"""

import inspect
from types import ModuleType

import torch

from cabochon.engine.attention import Backend
from cabochon.engine.errors import ConfigError

USUAL_PAGE_TOKENS = 16  # fine enough for prefixes of prompts
PAGE_TOKENS = 256  # the library's paged calls take multiples of it, no less
MIN_VERSION = (2, 8)
OLDEST_GPU = (8, 0)
MAX_HEAD_DIM = 256
BOTH = {"softmax_scale", "causal", "window_size", "softcap", "block_table"}
CALLS = {  # what flash_attention passes by name
    "flash_attn_varlen_func": BOTH | {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"},
    "flash_attn_with_kvcache": BOTH | {"cache_seqlens"},
}


def check_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises ConfigError with the first thing that the flash-attn backend lacks here."""
    lacks = _of_the_gpu(device) or _of_the_model(dtype, head_dim) or _of_the_package()
    if lacks is not None:
        raise ConfigError(f"attention_backend flash-attn needs {lacks}")


def settle_page_tokens(asked: int | None, backend: Backend) -> int:
    """Tokens per page. Raises ConfigError if the backend cannot read pages of the size asked for."""
    if backend != "flash-attn":
        return asked or USUAL_PAGE_TOKENS
    page_tokens = asked or PAGE_TOKENS
    if page_tokens % PAGE_TOKENS:
        raise ConfigError(
            f"page_tokens must be a multiple of {PAGE_TOKENS} with attention_backend flash-attn, got"
            f" {page_tokens}: leave it out for {PAGE_TOKENS}, or use triton"
        )
    return page_tokens


def _of_the_gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"an NVIDIA GPU, got {device.type}: use device cuda if there is one, else torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"a GPU of compute capability 8.0 or newer, got {'.'.join(map(str, capability))}: use torch"
    return None


def _of_the_model(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype != torch.bfloat16:
        return f"dtype bf16, got {str(dtype).removeprefix('torch.')}: use bf16, or triton"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"heads of at most {MAX_HEAD_DIM}, a multiple of 8, got {head_dim}: use triton"
    return None


def _of_the_package() -> str | None:
    try:
        import flash_attn  # optional, and a broken build says so only here
    except ImportError as error:
        return f"the flash-attn package, got {error}: install cabochon[flash-attn], or use triton"
    return _of_its_calls(flash_attn)


def _of_its_calls(package: ModuleType) -> str | None:
    version = str(getattr(package, "__version__", "none"))
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    if tuple(numbers) < MIN_VERSION:
        return f"flash-attn 2.8 or newer, got {version}: upgrade it, or use triton"
    for name, needed in CALLS.items():
        call = getattr(package, name, None)
        missing = needed - set(inspect.signature(call).parameters) if call else needed
        if missing:
            return f"{', '.join(sorted(missing))} in {name}, got a flash-attn {version} without: use triton"
    return None
