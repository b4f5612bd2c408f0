"""What the argmax and the draw compare: a row's logits after cap, bias, penalties, grammar and temperature.

Positions 0 .. num_dense are token ids (those from V on do not exist), then come the row's entries. A token
that is an entry scores −inf at its id. Every operation is sampler.Sampler's, in its order and in fp32, with
division rounded to nearest: compiled without fused multiply-add, all give torch's bits but tanh and its cap.
"""

import triton
import triton.language as tl

from cabochon.kernels.sampling_state import GRAMMAR, GREEDY, SEEN, STOP

LARGEST = tl.constexpr(1e30)  # sampling.LARGEST


@triton.jit
def softcapped(x, cap, HAS_CAP: tl.constexpr):
    """cap · tanh(x / cap), fp32; the series keeps small values as exact as large ones."""
    if HAS_CAP:
        y = tl.minimum(tl.maximum(tl.div_rn(x, cap), -20.0), 20.0)
        y2 = y * y
        series = y2 * (-1.0 / 3.0 + y2 * (2.0 / 15.0 + y2 * (-17.0 / 315.0 + y2 * (62.0 / 2835.0))))
        tanh = 1.0 - tl.div_rn(2.0, tl.exp(2.0 * tl.abs(y)) + 1.0)
        x = cap * tl.where(tl.abs(y) < 0.25, y + y * series, tl.where(y < 0, -tanh, tanh))
    return x


@triton.jit
def bit_of(bits_ptr, ids, exists):
    """Whether a token's bit is set. bits_ptr: the row's words."""
    word = tl.load(bits_ptr + ids // 32, mask=exists, other=0)
    return ((word >> (ids % 32)) & 1) != 0


@triton.jit
def open_row(
    row, logits_row_ptr, floats_ptr, entry_ids_ptr, entry_bias_ptr, entry_counts_ptr, entry_marks_ptr,
    entry_bits_ptr, allowed_bits_ptr, entries_stride, bits_stride, num_entries, flags, is_free, cap, V,
    num_dense,
):  # fmt: skip
    """All that scores need of a row, as a tuple. row: int64."""
    first, bits = row * entries_stride, row * bits_stride
    return (
        logits_row_ptr, entry_ids_ptr + first, entry_bias_ptr + first, entry_counts_ptr + first,
        entry_marks_ptr + first, entry_bits_ptr + bits, allowed_bits_ptr + bits,
        num_entries, flags, is_free, cap, V, num_dense,
        tl.load(floats_ptr + row * 4), tl.load(floats_ptr + row * 4 + 1),
        tl.load(floats_ptr + row * 4 + 2), tl.load(floats_ptr + row * 4 + 3),
    )  # fmt: skip


@triton.jit
def read_logits(p, row):
    """p: positions. Returns (token ids, exists, logits in fp32, −inf where nothing exists)."""
    logits_ptr, entry_ids_ptr, num_entries, V, num_dense = row[0], row[1], row[7], row[11], row[12]
    is_entry = p >= num_dense
    e = p - num_dense
    exists = tl.where(is_entry, e < num_entries, p < V)
    entry_ids = tl.load(entry_ids_ptr + e, mask=exists & is_entry, other=0)
    ids = tl.where(is_entry, entry_ids, p)
    logits = tl.load(logits_ptr + ids, mask=exists, other=float("-inf"))
    return ids, exists, logits.to(tl.float32)


@triton.jit
def scored(y, p, ids, exists, row):
    """y: softcapped logits at positions p. Returns scores, −inf where nothing exists or is allowed."""
    _, _, bias_ptr, counts_ptr, marks_ptr, entry_bits_ptr, allowed_bits_ptr = row[:7]
    num_entries, flags, is_free = row[7], row[8], row[9]
    temperature, repetition, presence, frequency = row[13], row[14], row[15], row[16]
    scores = tl.where(exists, y, float("-inf"))
    if num_entries > 0:
        e = p - row[12]
        listed = exists & (e >= 0)
        counts = tl.load(counts_ptr + e, mask=listed, other=0)
        marks = tl.load(marks_ptr + e, mask=listed, other=0)
        own = y + tl.load(bias_ptr + e, mask=listed, other=0.0)
        if repetition != 1.0:
            repeated = tl.where(own > 0, tl.div_rn(own, repetition), own * repetition)
            repeated = tl.minimum(tl.maximum(repeated, -LARGEST), LARGEST)
            own = tl.where((marks & SEEN) != 0, repeated, own)
        own = tl.where(counts > 0, own - (presence + frequency * counts.to(tl.float32)), own)
        own = tl.where(((marks & STOP) != 0) & (is_free == 0), float("-inf"), own)
        is_listed_elsewhere = bit_of(entry_bits_ptr, ids, exists)
        scores = tl.where(listed, own, tl.where(is_listed_elsewhere, float("-inf"), scores))
    if (flags & GRAMMAR) != 0:
        scores = tl.where(bit_of(allowed_bits_ptr, ids, exists), scores, float("-inf"))
    if (flags & GREEDY) == 0:
        scores = tl.div_rn(scores, temperature)
    return scores


@triton.jit
def scores_at(p, row, HAS_CAP: tl.constexpr):
    """Returns (token ids, scores) at positions p."""
    ids, exists, logits = read_logits(p, row)
    return ids, scored(softcapped(logits, row[10], HAS_CAP), p, ids, exists, row)
