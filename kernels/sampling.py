"""Choosing tokens: counter-based Gumbel noise and truncation thresholds, as torch defines them.

Noise    g(seed, position, token) = −log(−log1p(−v)), v = (h + ½) / 2³², h the 32-bit hash below. Large g
         comes from small v, where fp32 has resolution; g is below GUMBEL_MAX. No other request enters.
Hash     key = mix64(seed + mix64(position)); h = mix32(mix32(token · 0x9E3779B1 + key_low) ^ key_high),
         mod 2³² (wrapping int32 here). mix32 is murmur3's finalizer, mix64 splitmix64's: kernels can match.
Argmax   of l / T + g is a draw from softmax(l / T): arXiv:1411.0030.
Nothing sorts the vocabulary. Truncations are value thresholds: ties at a threshold all survive.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.definitions import softcap_
from cabochon.kernels.native.sampling import Slack, find_candidates

GUMBEL_MAX = 23.0  # −log(−log1p(−2⁻³³)) = 22.874, and room for rounding
EXACT_TOKENS = 4096  # at once: each is a row of the hidden states and one of the embedding
NUCLEUS_START = 256  # tokens of a first look at the nucleus, which on real text is mostly enough
NUCLEUS_SORT = 4096  # sorting that many takes less than another halving pass
WEIGHTLESS = 104.0  # exp(−104) is 0 in fp32: tokens that far below the maximum have no mass
LARGEST = 1e30  # a penalized logit stays inside ±this, and inside fp32 when a temperature of 1e-5 divides it
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def mix64(x: int) -> int:
    """splitmix64's finalizer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def noise_key(seed: int, position: int) -> int:
    """64 bits."""
    return mix64((seed + mix64(position)) & _MASK64)


def hash32(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """token_ids: [...] int64. Returns [...] int64 in [0, 2³²)."""
    return _signed_hash(seed, position, token_ids).long() & _MASK32


def _signed_hash(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """The hash's 32 bits as int32, which multiplies modulo 2³² at half the width of int64."""
    key = noise_key(seed, position)
    x = token_ids.to(torch.int32).mul_(_signed(0x9E3779B1)).add_(_signed(key & _MASK32))
    return _mix32_(_mix32_(x).bitwise_xor_(_signed(key >> 32)))


def _mix32_(x: Tensor) -> Tensor:
    """In place. x: [...] int32; >> copies the sign, which the masks take away."""
    x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(_signed(0x85EBCA6B))
    x.bitwise_xor_((x >> 13) & 0x7FFFF).mul_(_signed(0xC2B2AE35))
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
    """The int32 of the same 32 bits."""
    return bits - (1 << 32) if bits >> 31 else bits


def gumbel(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for (seed, position, token). token_ids: [...] int64. Returns [...] fp32."""
    shifted = _signed_hash(seed, position, token_ids).bitwise_xor_(-(1 << 31))  # h − 2³¹, without int64
    v = shifted.double().add_(2.0**31 + 0.5).mul_(2.0**-32).float()
    v.clamp_(max=1 - 2.0**-24)  # the largest fp32 below 1: v = 1 would give −inf
    return v.neg_().log1p_().neg_().log_().neg_()


class Draw(NamedTuple):
    """A token to be drawn from softmax(logits[row] / temperature), by the noise of (seed, position)."""

    row: int
    temperature: float
    seed: int
    position: int


def draw(
    logits: Tensor,
    draws: Sequence[Draw],
    cap: float | None = None,
    slack: Slack | None = None,
    exact: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[int]:
    """One token for each, of logits [R, V] without NaN, softcapped first. On a CPU all rows in one call of C.

    exact: rows [C], token ids [C] -> logits [C] fp32 that are drawn from instead of those, which are within
    the slack of them.
    """
    keys = [noise_key(each.seed, each.position) for each in draws]
    rows, temperatures = [each.row for each in draws], [each.temperature for each in draws]
    found = find_candidates(logits, rows, temperatures, keys, cap, slack) or [None] * len(draws)

    def logits_of(row: int, ids: Tensor) -> Tensor:
        if exact is None or slack is None:
            return logits[row, ids].float()
        parts = torch.split(ids, EXACT_TOKENS)
        return torch.cat([exact(torch.full_like(part, row), part) for part in parts])

    chosen = []
    for each, ids in zip(draws, found, strict=True):
        if ids is None:
            everything = torch.arange(logits.shape[1], device=logits.device)
            scaled = _scaled(logits_of(each.row, everything), each, cap)
            chosen.append(gumbel_argmax_reference(scaled, each.seed, each.position))
        else:
            chosen.append(int(ids) if len(ids) == 1 else winner(each, ids, logits_of(each.row, ids), cap))
    return chosen


def winner(draw: Draw, token_ids: Tensor, logits: Tensor, cap: float | None) -> int:
    """Of a few tokens [C], ascending, with these logits [C] fp32, not capped and ours to overwrite."""
    noise = gumbel(draw.seed, draw.position, token_ids)
    return int(token_ids[(_scaled(logits, draw, cap) + noise).argmax()])


def _scaled(logits: Tensor, draw: Draw, cap: float | None) -> Tensor:
    return (logits if cap is None else softcap_(logits, cap)) / draw.temperature


def gumbel_argmax(scaled: Tensor, seed: int, position: int) -> int:
    """A draw from softmax(scaled): argmax of scaled + noise, ties to the lowest id. scaled: [V] fp32."""
    return draw(scaled[None], [Draw(0, 1.0, seed, position)])[0]


def gumbel_argmax_reference(scaled: Tensor, seed: int, position: int) -> int:
    """The definition of gumbel_argmax.

    Only tokens that could reach a lower bound on the winner get noise. Rounding is monotone, so
    fl(s + g) ≤ fl(s + GUMBEL_MAX) < bound proves at any magnitude that the others lose.
    """
    best = scaled.argmax(keepdim=True)
    bound = scaled[best] + gumbel(seed, position, best)
    candidates = (scaled + GUMBEL_MAX >= bound).nonzero().view(-1)  # ascending ids
    perturbed = scaled[candidates] + gumbel(seed, position, candidates)
    return int(candidates[perturbed.argmax()])


def truncation_threshold(scaled: Tensor, *, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest value that survives top-k, then top-p of what is left, and min-p. scaled: [V] fp32."""
    highest = float(scaled.max())
    threshold = -math.inf
    if 0 < top_k < len(scaled):
        threshold = float(scaled.topk(top_k, sorted=False).values.min())
    if top_p < 1:
        threshold = max(threshold, _nucleus_threshold(scaled, highest, threshold, top_p))
    if min_p > 0:
        threshold = max(threshold, highest + math.log(min_p))
    return threshold


def _nucleus_threshold(scaled: Tensor, highest: float, floor: float, top_p: float) -> float:
    """Last value of the smallest set of values ≥ floor that holds a share top_p of their mass."""
    weights = (scaled - highest).exp_()
    if floor > -math.inf:
        weights.masked_fill_(scaled < floor, 0)
    wanted = top_p * float(weights.sum(dtype=torch.float64))
    first = scaled.topk(min(NUCLEUS_START, len(scaled))).values
    mass = (first - highest).exp_().cumsum(0, dtype=torch.float64)
    inside = int(torch.searchsorted(mass, wanted))  # first index with mass ≥ wanted
    if inside < len(first):
        return float(first[inside])
    return _value_at_mass(scaled[scaled >= max(floor, highest - WEIGHTLESS)], highest, wanted)


def _value_at_mass(values: Tensor, highest: float, wanted: float) -> float:
    """The largest value such that it and all above weigh `wanted`. Halves the range of values, not a sort."""
    weights = (values - highest).exp_()
    above = 0.0  # mass of what lies above `values`
    while len(values) > NUCLEUS_SORT:
        low, high = values.aminmax()
        if low == high:
            return float(low)
        middle = (low + high) / 2
        is_upper = values >= (middle if middle > low else high)  # a true part of them, so this ends
        upper_mass = float(weights[is_upper].sum(dtype=torch.float64))
        if above + upper_mass < wanted:
            above += upper_mass
            is_upper.logical_not_()
        values, weights = values[is_upper], weights[is_upper]
    values, order = values.sort(descending=True)
    mass = weights[order].cumsum(0, dtype=torch.float64).add_(above)
    return float(values[min(int(torch.searchsorted(mass, wanted)), len(values) - 1)])


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
    """In place, on capped logits [V] fp32. seen: [A] ids in prompt or output, repeated or not.

    output_ids, counts: [B], the distinct ids of the output and how often each is there.

    repetition: l / r for positive l, else l · r (arXiv:1909.05858); the others as OpenAI documents.
    """
    if repetition != 1:
        old = logits[seen]
        new = torch.where(old > 0, old / repetition, old * repetition)
        logits[seen] = new.clamp_(-LARGEST, LARGEST)
    logits[output_ids] -= presence + frequency * counts
