"""Gumbel noise of (seed, position, token id) inside a kernel: sampling.gumbel, exactly up to its logarithms.

Hash     the same 32 bits as sampling.hash32
v        (h + ½) / 2³² rounded once to fp32, as there, but by integers: a GPU's fp64 may be 64 times slower
log1p    log(w) · v / (1 − w) with w = 1 − v, exact to a few ulp (Goldberg 1991, theorem 4): triton has none.
         Its log and torch's differ in the last bits, and so does the noise (tests/kernels/test_noise.py).
"""

import triton
import triton.language as tl


@triton.jit
def noise_key(seed, position):
    """The key of a row's noise at one position. seed, position: integers. Returns a uint64."""
    return _mix64(seed.to(tl.uint64) + _mix64(position.to(tl.uint64)))


@triton.jit
def hash32(key, token_ids):
    """key: uint64. token_ids: integers. Returns uint32."""
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    return _mix32(_mix32(token_ids.to(tl.uint32) * 0x9E3779B1 + low) ^ high)


@triton.jit
def uniform(h):
    """(h + ½) / 2³² in fp32, rounded once, below 1. h: uint32."""
    # From 2²⁵ on, h + ½ is never halfway between two floats, so any odd bit rounds as the half does.
    even = (h + 1) & 0xFFFFFFFE
    large = tl.where(h < 0x2000000, even, h | 1).to(tl.float32)
    v = tl.where(h < 0x1000000, h.to(tl.float32) + 0.5, large) * 2.3283064365386963e-10  # 2⁻³²
    return tl.minimum(v, 0.99999994)  # 1 − 2⁻²⁴, the largest fp32 below 1


@triton.jit
def gumbel(key, token_ids):
    """Standard Gumbel noise, fp32. key: uint64. token_ids: integers."""
    v = uniform(hash32(key, token_ids))
    w = 1.0 - v
    rest = tl.where(w == 1.0, 1.0, 1.0 - w)
    log1p = tl.where(w == 1.0, -v, tl.log(w) * tl.div_rn(v, rest))
    return -tl.log(-log1p)


@triton.jit
def _mix64(x):
    """splitmix64's finalizer."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    """murmur3's finalizer."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
