"""gelu_tanh(gate) · up, from one packed GEMM output.

Math     gelu(x) = x · ½ (1 + tanh(z)) = x / (1 + exp(−2 z)), z = √(2/π) (x + 0.044715 x³), in fp32: the form
         without tanh keeps its relative precision where gelu is small. Rounded before the product and after.
Grid     (token t, tile of F)
Traffic  reads 2 T · F, writes T · F elements: bound by memory bandwidth
Source   arXiv:1606.08415; the definition is definitions.geglu
"""

import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm

BLOCK_F = 1024


def geglu(gate_up: Tensor, *, out: Tensor) -> None:
    """Gate the MLP's hidden rows.

    gate_up: [T, 2 F], gate first, contiguous rows. out: [T, F], contiguous rows, apart from gate_up.
    Raises ValueError if shapes disagree.
    """
    T, F = out.shape
    if gate_up.shape != (T, 2 * F) or gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"gate_up must be [{T}, 2 · {F}] with contiguous rows, got {list(gate_up.shape)}")
    _geglu_kernel[(T, triton.cdiv(F, BLOCK_F))](
        gate_up, out, gate_up.stride(0), out.stride(0), F, BLOCK_F=BLOCK_F
    )


@triton.jit
def gelu_tanh(x):
    """x: fp32, any shape."""
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def _geglu_kernel(gate_up_ptr, out_ptr, gate_up_stride_t, out_stride_t, F, BLOCK_F: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # int64: T · 2 F can pass 2^31
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    valid = f < F
    row_ptr = gate_up_ptr + t * gate_up_stride_t
    gate = tl.load(row_ptr + f, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_F]
    up = tl.load(row_ptr + F + f, mask=valid, other=0.0).to(tl.float32)
    activated = gelu_tanh(gate).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + t * out_stride_t + f, activated * up, mask=valid)


def compile_specs() -> list[CompileSpec]:
    """The only configuration."""
    return on_every_sm(_geglu_kernel, ("*bf16", "*bf16", *["i32"] * 3), 4, {"BLOCK_F": BLOCK_F})
