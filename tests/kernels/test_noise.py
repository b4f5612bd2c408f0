"""The kernels' noise is the definition's: the hash exactly, the Gumbel value to a few ulp."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cabochon.kernels import noise, sampling


@triton.jit
def _kernel(seeds_ptr, positions_ptr, hash_ptr, gumbel_ptr, V, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    key = noise.noise_key(tl.load(seeds_ptr + r), tl.load(positions_ptr + r))
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = ids < V
    tl.store(hash_ptr + r * V + ids, noise.hash32(key, ids).to(tl.int64), mask=valid)
    tl.store(gumbel_ptr + r * V + ids, noise.gumbel(key, ids), mask=valid)


def ours(seeds: list[int], positions: list[int], V: int) -> tuple[torch.Tensor, torch.Tensor]:
    hashes, values = torch.empty(len(seeds), V, dtype=torch.int64), torch.empty(len(seeds), V)
    at = torch.tensor(seeds), torch.tensor(positions, dtype=torch.int32)
    _kernel[(len(seeds), triton.cdiv(V, 16384))](*at, hashes, values, V, BLOCK=16384)
    return hashes, values


def test_the_hash_is_the_definitions() -> None:
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**63 - 1, *rng.integers(0, 2**63 - 1, 10).tolist()]
    positions = [0, 2**31 - 1, 0, *rng.integers(0, 2**20, 10).tolist()]
    hashes, _ = ours(seeds, positions, 3000)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert torch.equal(hashes[row], sampling.hash32(seed, position, torch.arange(3000)))


def test_the_noise_is_the_definitions_to_a_few_ulp() -> None:
    hashes, values = ours([5], [17], 262_144)
    v = (hashes.double() + 0.5) * 2.0**-32
    truth = -(-torch.log1p(-v.float().double())).log()
    theirs = sampling.gumbel(5, 17, torch.arange(262_144))
    for mine in (values, theirs):
        assert ((mine - truth[0]).abs() <= 5e-7 * truth.abs().clamp(min=1)).all()
    assert (values[0] - theirs).abs().max() < 4e-6
    assert values.max() < sampling.GUMBEL_MAX


@triton.jit
def _uniform_kernel(bits_ptr, v_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(v_ptr + i, noise.uniform(tl.load(bits_ptr + i).to(tl.uint32)))


@pytest.mark.parametrize("center", [0, 2**23, 2**24, 2**25, 2**26, 2**31, 2**32])
def test_uniforms_are_rounded_as_the_definitions(center: int) -> None:
    """Around every border of the integer rounding, and at both ends."""
    bits = (center + torch.arange(-512, 512)).clamp(0, 2**32 - 1)
    v = torch.empty(1024)
    _uniform_kernel[(1,)](bits, v, BLOCK=1024)
    expected = ((bits.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    assert torch.equal(v, expected)
