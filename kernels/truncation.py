"""The draw from what top-k, top-p and min-p leave of a row: no sort, and mostly no second pass over V.

Head     the tile pass leaves the maximum of every SUB positions. At most NUM_ACTIVE of these maxima reach a
         key `lowest`; all scores from it on lie behind those maxima, and are read again.
Search   thresholds are found by halving the range of order-preserving integer keys. Masses are integers in
         units of 2⁻⁴⁴ of the largest: sums are exact in any order, and the same in the head and in the row.
Row      a threshold below `lowest` (a flat distribution, a large k) is searched in passes over the whole row,
         each of which quarters the range.
Same     top-k and min-p give sampling.truncation_threshold exactly; for top-p a boundary token may differ if
         the mass above it is within some 1e-6 of top_p (fp32 exponentials).
"""

import triton
import triton.language as tl

from cabochon.kernels.noise import gumbel
from cabochon.kernels.scores import scores_at

MASS_UNIT = tl.constexpr(17592186044416.0)  # 2⁴⁴: V = 2¹⁸ of them stay below 2⁶³
KEY_OF_NOTHING = tl.constexpr(-2139095041)  # order_key(−inf)
SMALLEST_KEY = tl.constexpr(-2147483648)


@triton.jit
def order_key(x):
    """fp32 to int32 such that both compare alike (−0 below +0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """Inverse of order_key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(scores, highest):
    """exp(score − highest) in units of 2⁻⁴⁴, int64."""
    return (tl.exp(scores - highest) * MASS_UNIT).to(tl.int64)


@triton.jit
def largest_key(keys, weights, wanted, low, high):
    """The largest t in [low, high) such that the weights of keys ≥ t reach `wanted`; low if none does.

    keys: int32, weights: int32 or int64, of one shape. wanted, low, high: int64 scalars.
    """
    while high - low > 1:
        middle = low + (high - low) // 2
        above = tl.sum(tl.where(keys >= middle.to(tl.int32), weights, 0), axis=0)
        low = tl.where(above >= wanted, middle, low)
        high = tl.where(above >= wanted, high, middle)
    return low


@triton.jit
def largest_key_in_row(
    row, wanted, low, high, highest, num_positions,
    IS_MASS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """largest_key over the whole row: weights are masses, or 1 for what is not −inf."""
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        one, two, three = low + step, low + 2 * step, low + 3 * step
        first, second, third = one.to(tl.int32), two.to(tl.int32), three.to(tl.int32)
        above_one = tl.zeros([BLOCK], tl.int64)
        above_two = tl.zeros([BLOCK], tl.int64)
        above_three = tl.zeros([BLOCK], tl.int64)
        for start in range(0, num_positions, BLOCK):
            _, scores = scores_at(start + tl.arange(0, BLOCK), row, HAS_CAP)
            keys = order_key(scores)
            if IS_MASS:
                weights = mass_of(scores, highest)
            else:
                weights = tl.where(keys > KEY_OF_NOTHING, 1, 0).to(tl.int64)
            above_one += tl.where(keys >= first, weights, 0)
            above_two += tl.where(keys >= second, weights, 0)
            above_three += tl.where(keys >= third, weights, 0)
        has_one = tl.sum(above_one, axis=0) >= wanted
        has_two = tl.sum(above_two, axis=0) >= wanted
        has_three = tl.sum(above_three, axis=0) >= wanted
        end = tl.where(has_three, high, tl.where(has_two, three, tl.where(has_one, two, one)))
        low = tl.where(has_three, three, tl.where(has_two, two, tl.where(has_one, one, low)))
        high = tl.minimum(high, end)
    return low


@triton.jit
def head_of_row(
    row, sub_max_ptr, active_ptr, num_subs,
    SUB: tl.constexpr, NUM_ACTIVE: tl.constexpr, BLOCK_SUBS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The head of the row. Returns (lowest key int64, ids, scores), [NUM_ACTIVE · SUB]; −inf below lowest.

    sub_max_ptr: [num_subs] fp32 maxima. active_ptr: [NUM_ACTIVE] int32, scratch of this program.
    """
    sub = tl.arange(0, BLOCK_SUBS)
    maxima = tl.load(sub_max_ptr + sub, mask=sub < num_subs, other=float("-inf"))
    keys = order_key(maxima)
    end = tl.max(keys, axis=0).to(tl.int64) + 1
    ones = tl.full([BLOCK_SUBS], 1, tl.int32)
    lowest = largest_key(keys, ones, NUM_ACTIVE + 1, tl.full([], SMALLEST_KEY, tl.int64), end) + 1
    lowest = tl.maximum(lowest, KEY_OF_NOTHING + 1)
    is_active = keys >= lowest.to(tl.int32)
    place = tl.cumsum(is_active.to(tl.int32), axis=0) - 1
    tl.store(active_ptr + place, sub, mask=is_active)
    tl.debug_barrier()  # other threads of this program read what these wrote
    a = tl.arange(0, NUM_ACTIVE)
    is_taken = a < tl.sum(is_active.to(tl.int32), axis=0)
    active = tl.load(active_ptr + a, mask=is_taken, other=0)
    p = active[:, None] * SUB + tl.arange(0, SUB)[None, :]  # [NUM_ACTIVE, SUB]
    p = tl.reshape(tl.where(is_taken[:, None], p, -1), [NUM_ACTIVE * SUB])
    ids, scores = scores_at(tl.maximum(p, 0), row, HAS_CAP)
    in_head = (p >= 0) & (order_key(scores) >= lowest.to(tl.int32))
    return lowest, ids, tl.where(in_head, scores, float("-inf"))


@triton.jit
def threshold_of_row(
    row, lowest, scores, highest, total, top_k, top_p, log_min_p, num_positions,
    BLOCK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The smallest score that survives, fp32: sampling.truncation_threshold.

    lowest, scores: head_of_row's. highest: the largest score, finite. total: mass of all scores, int64.
    """
    keys = order_key(scores)
    has_all = lowest == KEY_OF_NOTHING + 1
    in_head = keys >= lowest.to(tl.int32)
    end = order_key(highest).to(tl.int64) + 1
    floor = tl.full([], KEY_OF_NOTHING, tl.int64)
    if (top_k > 0) & (top_k < row[11]):
        k = top_k.to(tl.int64)
        count = in_head.to(tl.int32)
        if (tl.sum(count, axis=0) >= top_k) | has_all:
            floor = largest_key(keys, count, k, floor, end)
        else:
            floor = largest_key_in_row(row, k, floor, lowest, highest, num_positions, False, HAS_CAP, BLOCK)
    threshold = floor
    if top_p < 1.0:
        kept = keys >= floor.to(tl.int32)
        masses = tl.where(in_head & kept, mass_of(scores, highest), 0)
        head = tl.sum(masses, axis=0)
        if floor > KEY_OF_NOTHING:
            total = head
            if floor < lowest:
                total = _mass_in_row(row, floor, highest, num_positions, HAS_CAP, BLOCK)
        wanted = tl.maximum((top_p * total.to(tl.float64)).to(tl.int64), 1)
        if (head >= wanted) | has_all:
            threshold = largest_key(keys, masses, wanted, floor, end)
        else:
            threshold = largest_key_in_row(
                row, wanted, floor, lowest, highest, num_positions, True, HAS_CAP, BLOCK
            )
    least = (highest.to(tl.float64) + log_min_p).to(tl.float32)
    return tl.maximum(value_of(threshold.to(tl.int32)), least)


@triton.jit
def draw_truncated(
    row, key, sub_max_ptr, active_ptr, highest, total, top_k, top_p, log_min_p, num_subs, num_positions,
    SUB: tl.constexpr, NUM_ACTIVE: tl.constexpr, BLOCK_SUBS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The token with the largest sum of score and noise among those that survive."""
    lowest, ids, scores = head_of_row(
        row, sub_max_ptr, active_ptr, num_subs, SUB, NUM_ACTIVE, BLOCK_SUBS, HAS_CAP
    )
    smallest = threshold_of_row(
        row, lowest, scores, highest, total, top_k, top_p, log_min_p, num_positions, BLOCK, HAS_CAP
    )
    if (lowest == KEY_OF_NOTHING + 1) | (order_key(smallest).to(tl.int64) >= lowest):
        survivors = tl.where(scores >= smallest, scores, float("-inf"))
        token_id, _ = best_of(survivors + gumbel(key, ids), ids)
    else:
        token_id = _draw_in_row(row, key, smallest, num_positions, HAS_CAP, BLOCK)
    return token_id


@triton.jit
def best_of(scores, ids):
    """Returns (id, score) of the largest, the lowest id among equals."""
    best = tl.max(scores, axis=0)
    return tl.min(tl.where(scores == best, ids, 0x7FFFFFFF), axis=0), best


@triton.jit
def _mass_in_row(row, floor, highest, num_positions, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    masses = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num_positions, BLOCK):
        _, scores = scores_at(start + tl.arange(0, BLOCK), row, HAS_CAP)
        masses += tl.where(order_key(scores) >= floor.to(tl.int32), mass_of(scores, highest), 0)
    return tl.sum(masses, axis=0)


@triton.jit
def _draw_in_row(row, key, smallest, num_positions, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    token_id = tl.full([], 0x7FFFFFFF, tl.int32)
    best = tl.full([], float("-inf"), tl.float32)
    for start in range(0, num_positions, BLOCK):
        ids, scores = scores_at(start + tl.arange(0, BLOCK), row, HAS_CAP)
        scores = tl.where(scores >= smallest, scores, float("-inf")) + gumbel(key, ids)
        here, score = best_of(scores, ids)
        token_id = tl.where((score > best) | ((score == best) & (here < token_id)), here, token_id)
        best = tl.maximum(best, score)
    return token_id
