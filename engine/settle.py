"""What each `auto` means on this machine, and what cannot be had here: device, backend, dtypes, products."""

import importlib.util
import logging
from functools import partial

import torch

from cabochon.engine.attention import Backend
from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.engine.int8_linear import Int8Head, Int8Linear
from cabochon.engine.kv_pages import FP8
from cabochon.engine.linear import Fp8Linear, Linear, MakeLinear
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.models.native_gemma import NativeGemma, can_run_native
from cabochon.engine.native_linear import native_linear
from cabochon.kernels.native.library import library

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)  # Ada, L4
NO_LIBRARY = "no native library: none was built (GCC 12 or newer does), or the CPU is older than AVX2"


def has_triton() -> bool:
    """Whether it is installed; importing it would cost a CPU engine its start."""
    return importlib.util.find_spec("triton") is not None


def settle_device(config: EngineConfig) -> torch.device:
    """Raises ConfigError if a GPU is asked for and torch sees none."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "device must be cpu where torch finds no NVIDIA GPU, got cuda: install a CUDA build of torch and"
            " its driver, or use cpu"
        )
    if config.device == "auto" and has_gpu:
        logger.warning("device=cpu reason=the GPU path has not run on a GPU yet, ask for it: --device cuda")
    return torch.device("cuda" if config.device == "cuda" else "cpu")


def settle_backend(config: EngineConfig, device: torch.device, model: ModelConfig) -> Backend:
    """`auto` says why. Raises ConfigError if Triton or C kernels are asked for where they cannot run."""
    can_triton = has_triton() and (
        device.type == "cuda" or (config.attention_backend == "triton" and _is_interpreted())
    )
    if config.attention_backend == "triton" and not can_triton:
        raise ConfigError(
            f"attention_backend must be torch on this {device.type}"
            f" {'with' if has_triton() else 'without'} triton installed, got triton: use torch"
        )
    reason = _why_not_native(device, model)
    if config.attention_backend == "native" and reason is not None:
        raise ConfigError(f"attention_backend must be torch with {reason}, got native: use torch")
    if config.attention_backend != "auto":
        return config.attention_backend
    if device.type == "cuda" and has_triton():
        logger.info("attention backend=triton reason=an NVIDIA GPU, and flash-attn is not measured yet")
        return "triton"
    if reason is None:
        logger.info("attention backend=native reason=no GPU")
        return "native"
    logger.info("attention backend=torch reason=%s", reason if device.type == "cpu" else "no triton")
    return "torch"


def _why_not_native(device: torch.device, model: ModelConfig) -> str | None:
    if device.type != "cpu":
        return f"a {device.type}"
    if library() is None:
        return NO_LIBRARY
    return None if can_run_native(model) else "a model whose rows or heads are no multiple of 16"


def _is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    import triton  # never on the start path of a CPU engine

    return bool(triton.knobs.runtime.interpret)


def settle_dtype(config: EngineConfig, device: torch.device) -> str:
    """bf16 or fp32. Raises ConfigError for bf16 where the hardware lacks it."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if config.dtype == "auto":
        return "bf16" if has_bf16 else "fp32"
    if config.dtype == "bf16" and not has_bf16:
        raise ConfigError(
            f"dtype must be fp32 on a {device.type} without bf16 instructions, got bf16: use fp32"
        )
    return config.dtype


def settle_kv_dtype(config: EngineConfig, backend: Backend, dtype: torch.dtype) -> torch.dtype:
    """`auto` is the working dtype. Raises ConfigError for fp8 where nothing reads it."""
    if config.kv_dtype == "fp8" and backend != "triton":
        raise ConfigError(
            f"kv_dtype must be auto with the {backend} attention backend, got fp8: use auto, or a GPU and"
            " attention_backend triton"
        )
    return FP8 if config.kv_dtype == "fp8" else dtype


def model_class_for(backend: Backend, config: ModelConfig) -> type[Gemma]:
    """The fused forward pass where its kernels take the model."""
    if backend == "native":
        return NativeGemma
    if backend != "triton":
        return Gemma
    from cabochon.engine.models.triton_gemma import (
        TritonGemma,
        can_fuse,
    )  # triton is optional: a CPU has no use for it

    return TritonGemma if can_fuse(config) else Gemma


def settle_linear(config: EngineConfig, device: torch.device, dtype_name: str) -> MakeLinear:
    """How weights are kept. Raises ConfigError if fp8 or int8 is asked for where it cannot run."""
    if config.quantization == "none":
        return Linear
    if config.quantization == "int8":
        if device.type != "cpu":
            raise ConfigError(
                f"quantization must be none or fp8 on a GPU, got int8 and {device.type}: use fp8, or"
                " device cpu"
            )
        if library() is None:
            raise ConfigError(f"quantization must be none with {NO_LIBRARY}, got int8: use none")
        return Int8Linear
    if device.type == "cpu":
        logger.warning(
            "quantization=fp8 device=cpu is emulated, slower than none and no smaller: to measure quality"
        )
        return Fp8Linear
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            "quantization must be none on a GPU of compute capability below 8.9, which has no fp8 products,"
            f" got fp8 and {capability[0]}.{capability[1]}: use none"
        )
    if dtype_name != "bf16":
        raise ConfigError(f"dtype must be bf16 with quantization fp8 on a GPU, got {dtype_name}: use bf16")
    return Fp8Linear


def model_maker(backend: Backend, config: ModelConfig, make_linear: MakeLinear) -> partial[Gemma]:
    """What makes the model from its weights, given the other arguments of `Gemma`."""
    if backend == "native" and make_linear is Linear:
        make_linear = native_linear
    return partial(model_class_for(backend, config), make_linear=make_linear, make_head=head_of(make_linear))


def head_of(make_linear: MakeLinear) -> MakeLinear:
    """How the output head is kept, which is the embedding too."""
    return Int8Head if make_linear is Int8Linear else make_linear
