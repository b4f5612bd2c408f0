"""Tile math that the prefill and the decode kernel share: page addresses, scores, softmax, sums.

Math     p = exp2(to_exp2 · tanh(to_unit · q Kᵀ) − m), acc += p V, total += Σ p; without a softcap no tanh
Static   scores under a softcap lie in ±cap, so no maximum is kept (m = 0): nothing is rescaled, and parts
         merge by addition. exp(50) · 8192 is far below the largest fp32, and bf16 has the same exponents.
Bits     the mask stands before the last multiplication: the compiler sees the same arithmetic after it on
         masked and on unmasked tiles. Hidden keys add an exact zero.
Parts    before sm_90 Triton gives each warp rows of its own only where a product is no wider than tall: V is
         taken in PARTS of at most BLOCK_M columns there
Source   arXiv:2205.14135 (tiles, running maximum); Gemma 2's report, arXiv:2408.00118 (softcap)
"""

import triton
import triton.language as tl


@triton.jit
def capped_tanh(x, USE_PTX_TANH: tl.constexpr):
    """tanh in fp32. PTX's is one instruction with an error of 5e-4; the other form has 1e-7."""
    if USE_PTX_TANH:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp2(tl.where(x > 10.0, 10.0, x) * 2.8853900817779268)  # exp(2x); inf / inf is NaN, NaN stays
        y = (e - 1.0) / (e + 1.0)
    return y


@triton.jit
def widen(x, q):
    """e4m3 to q's dtype, exactly; what has it already stays.

    GPUs before sm_89 have no conversion from e4m3: there pages come as bytes. Its bits, moved into a half's
    exponent and mantissa, are the value over 2⁸, subnormals included.
    """
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        y = (half * 256.0).to(q.dtype)
    else:
        y = x.to(q.dtype)
    return y


@triton.jit
def load_needed(pointers, needed, IS_MASKED: tl.constexpr):
    """What is not needed is zero and never read: recycled pages hold NaN, and 0 · NaN is NaN."""
    return tl.load(pointers, mask=needed, other=0.0) if IS_MASKED else tl.load(pointers)


@triton.jit
def softmax_step(
    scores, visible, maximum, to_unit, to_exp2,
    HAS_SOFTCAP: tl.constexpr, IS_STATIC: tl.constexpr, USE_PTX_TANH: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] to weights p [M, N], the new maximum [M] and the factor [M] of what was summed so far."""
    if HAS_SOFTCAP:
        scores = capped_tanh(scores * to_unit, USE_PTX_TANH)
    if IS_MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    if IS_STATIC:
        p = tl.exp2(scores * to_exp2)
        new, rescale = maximum, maximum
    else:
        new = tl.maximum(maximum, tl.max(scores, axis=1) * to_exp2)
        finite = tl.where(new == float("-inf"), 0.0, new)  # a row that sees nothing yet: −inf − −inf is NaN
        p = tl.exp2(scores * to_exp2 - finite[:, None])
        rescale = tl.exp2(maximum - finite)
    return p, new, rescale


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """Sums of no keys: PARTS accumulators [M, D / PARTS] of p V, Σ p [M] and the maximum [M], all fp32."""
    accs = ()
    for _ in tl.static_range(PARTS):
        acc = tl.zeros([BLOCK_M, D // PARTS], tl.float32)
        accs = accs + (acc,)  # type: ignore[assignment]  # noqa: RUF005  # Triton cannot unpack
    return accs, tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)


@triton.jit
def attend_keys(
    state, q, position, start, end, first, W, pages, strides, to_unit, to_exp2,
    P: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_STATIC: tl.constexpr, HAS_SCALES: tl.constexpr, USE_PTX_TANH: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add tiles of keys from `start` to `end` to a state.

    q: [M, D], rows at `position` [M]. IS_MASKED: keys before `first` and from `end` on are not read, those
    that a row must not see weigh nothing; else every row sees every key of whole tiles.
    pages: K, V, their scales, all at the KV head, and the sequence's page numbers. strides: of a page and of
    a token in it, of K and V in rows of D, then of the scales.
    """
    accs, total, maximum = state
    k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, page_table_ptr = pages
    page_rows, token_rows, scales_page_stride, scales_token_stride = strides
    d = tl.arange(0, D)[None, :]
    n = tl.arange(0, BLOCK_N)
    key = start + n
    next_page = tl.load(page_table_ptr + key // P, mask=(key >= first) & (key < end), other=0)
    for tile_start in range(start, end, BLOCK_N):
        key, page = tile_start + n, next_page
        # A tile ahead, by hand: the pipeline would spend its stages on the lookup, not on buffers for K and V
        next_page = tl.load(page_table_ptr + (key + BLOCK_N) // P, mask=key + BLOCK_N < end, other=0)
        needed = (key >= first) & (key < end)
        visible = needed[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible &= key[None, :] > position[:, None] - W
        row = page * page_rows + (key % P) * token_rows  # int32, as `at`: they take fewer registers
        offset = (row.to(tl.int64) * D)[:, None]  # N · P · Hkv · D passes 2³¹ at 27B
        k = widen(load_needed(k_ptr + d + offset, needed[:, None], IS_MASKED), q)  # [N, D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
        at = page * scales_page_stride + (key % P) * scales_token_stride
        if HAS_SCALES:
            scores *= load_needed(k_scales_ptr + at, needed, IS_MASKED)[None, :]
        p, maximum, rescale = softmax_step(
            scores, visible, maximum, to_unit, to_exp2, HAS_SOFTCAP, IS_STATIC, USE_PTX_TANH, IS_MASKED
        )
        if HAS_SCALES:
            weights = (p * load_needed(v_scales_ptr + at, needed, IS_MASKED)[None, :]).to(q.dtype)
            added = tl.sum(p, axis=1)
        else:
            weights = p.to(q.dtype)
            added = tl.sum(weights.to(tl.float32), axis=1)  # of the rounded weights: their errors cancel
        total = total + added if IS_STATIC else total * rescale + added
        new_accs = ()
        for part in tl.static_range(PARTS):
            e = part * (D // PARTS) + tl.arange(0, D // PARTS)[None, :]
            v = widen(load_needed(v_ptr + e + offset, needed[:, None], IS_MASKED), q)  # [N, D / PARTS]
            acc = accs[part] if IS_STATIC else accs[part] * rescale[:, None]
            acc = tl.dot(weights, v, acc, input_precision="ieee")
            new_accs = new_accs + (acc,)  # type: ignore[assignment]  # noqa: RUF005
        accs = new_accs
    return accs, total, maximum
