"""The repairs of Triton's interpreter in conftest.py: what a GPU does, and the interpreter alone does not."""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, num, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    acc = tl.zeros([N, N], tl.float32)
    for _ in range(0, num):
        acc = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), acc)
    tl.store(out_ptr + at, acc)


@triton.jit
def _round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def test_a_product_in_bf16_is_one_of_numbers_in_a_loop_of_any_length() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=g).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, 2, N=16)
    torch.testing.assert_close(out, 2 * (a.float() @ b.float()))


def test_fp32_is_rounded_to_bf16_as_torch_rounds_it() -> None:
    edges = [1 + 2**-8, 1 + 3 * 2**-8, 1.9999, 3.4e38, torch.inf, -torch.inf, 1e-40, 0.0]
    x = torch.cat([torch.tensor(edges), torch.randn(56, generator=torch.Generator().manual_seed(0))])
    out = torch.empty(64, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out, N=64)
    assert torch.equal(out, x.bfloat16())
