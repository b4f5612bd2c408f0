"""Choosing tokens: counter-based Gumbel noise and truncation thresholds, as torch defines them.

Noise    g(seed, position, token) = −log(−log1p(−v)), v = (h + ½) / 2³², h the 32-bit hash below. Large g comes from
         small v, where fp32 has resolution; g is below GUMBEL_MAX. A token of no other request enters.
Hash     key = mix64(seed + mix64(position)); h = mix32(mix32(token · 0x9E3779B1 + key_low) ^ key_high), mod 2³².
         mix32 is murmur3's finalizer, mix64 splitmix64's. Integer only: a GPU kernel can be bit-equal.
Argmax   of l / T + g is a draw from softmax(l / T): arXiv:1411.0030.
Nothing sorts the vocabulary. Truncations are value thresholds: ties at a threshold all survive.
"""

import math

import torch
from torch import Tensor

GUMBEL_MAX = 23.0  # −log(−log1p(−2⁻³³)) = 22.874, and room for rounding
NUCLEUS_START = 64  # candidates of a first look at the nucleus; grows eightfold
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def mix64(x: int) -> int:
    """splitmix64's finalizer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def hash32(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """token_ids: [...] int64. Returns [...] int64 in [0, 2³²)."""
    key = mix64((seed + mix64(position)) & _MASK64)
    x = (token_ids * 0x9E3779B1 + (key & _MASK32)) & _MASK32
    return _mix32(_mix32(x) ^ (key >> 32))


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def gumbel(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for (seed, position, token). token_ids: [...] int64. Returns [...] fp32."""
    v = (hash32(seed, position, token_ids).double() + 0.5).mul_(2.0**-32).float()
    v.clamp_(max=1 - 2.0**-24)  # the largest fp32 below 1: v = 1 would give −inf
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_argmax(scaled: Tensor, seed: int, position: int) -> int:
    """A draw from softmax(scaled): argmax of scaled + noise, ties to the lowest id. scaled: [V] fp32.

    Only tokens within GUMBEL_MAX of a lower bound on the winner get noise: the others cannot win.
    """
    best = scaled.argmax(keepdim=True)
    bound = scaled[best] + gumbel(seed, position, best)
    candidates = (scaled >= bound - GUMBEL_MAX).nonzero().view(-1)  # ascending ids
    perturbed = scaled[candidates] + gumbel(seed, position, candidates)
    return int(candidates[perturbed.argmax()])


def truncation_threshold(scaled: Tensor, *, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest value of `scaled` that survives top-k, then top-p of what is left, and min-p. scaled: [V] fp32."""
    highest = float(scaled.max())
    threshold = -math.inf
    if 0 < top_k < len(scaled):
        threshold = float(scaled.topk(top_k).values[-1])
    if top_p < 1:
        threshold = max(threshold, _nucleus_threshold(scaled, highest, threshold, top_p))
    if min_p > 0:
        threshold = max(threshold, highest + math.log(min_p))
    return threshold


def _nucleus_threshold(scaled: Tensor, highest: float, floor: float, top_p: float) -> float:
    """Value of the last token of the smallest set of values ≥ floor that holds a share top_p of their mass."""
    weights = (scaled - highest).exp_()
    if floor > -math.inf:
        weights.masked_fill_(scaled < floor, 0)
    wanted = top_p * float(weights.sum(dtype=torch.float64))
    num = NUCLEUS_START
    while True:
        num = min(num, len(scaled))
        values = scaled.topk(num).values
        mass = (values - highest).exp_().cumsum(0, dtype=torch.float64)
        inside = int(torch.searchsorted(mass, wanted))  # first index with mass ≥ wanted
        if inside < num or num == len(scaled):
            return float(values[min(inside, num - 1)])
        num *= 8


def penalize_(
    logits: Tensor,
    seen: Tensor,
    output_ids: Tensor,
    counts: Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """In place, on capped logits [V] fp32. seen: [A] ids in prompt or output; output_ids, counts: [B] of the output.

    repetition: l / r for positive l, else l · r (arXiv:1909.05858); presence and frequency as OpenAI documents.
    """
    if repetition != 1:
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / repetition, old * repetition)
    logits[output_ids] -= presence + frequency * counts
