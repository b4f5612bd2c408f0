"""FlashAttention's two paged calls in plain torch, for tests without a GPU: signatures, masks, refusals.

Written from the package's documentation and host code, version 2.8.3. Where that leaves something open, this
is as unfriendly as the kernels: rows of q in no sequence come back as NaN, and a weight of zero still
multiplies the value it hides, if both are in a tile of keys that the kernel reads.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3"

DTYPES = {torch.bfloat16, torch.float16}  # tests that compare tokens with fp32 add it
QUERY_TILE = 64
calls: Counter[str] = Counter()


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """q: [T, Hq, D], sequence i at cu_seqlens_q[i] : cu_seqlens_q[i + 1]. k, v: pages. Returns [T, Hq, D]."""
    _only_what_is_written(dropout_p=dropout_p, alibi_slopes=alibi_slopes, probs=return_attn_probs)
    calls["varlen"] += 1
    _check(q, k, v, block_table, len(cu_seqlens_q) - 1, q_dims=3)
    assert block_table is not None
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _refuse(bounds.dtype != torch.int32, f"{name} is not int32")
        _refuse(not bounds.is_contiguous(), f"{name} is not contiguous")
        _refuse(bounds.shape != (len(block_table) + 1,), f"{name} has {len(bounds)} bounds")
    _refuse(q.shape[2] % 8 != 0, "the head dimension is no multiple of 8")
    lens_q, lens_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    # Too small a maximum leaves rows out, without a word
    assert max_seqlen_q >= max(lens_q)
    assert max_seqlen_k >= max(lens_k)
    if max_seqlen_q == 1 and window_size == (-1, -1) and q.shape[1] > k.shape[2]:
        _refuse(len(q) != len(block_table), "one token each, but q has another number of rows")
    out = torch.full_like(q, torch.nan)
    start = int(cu_seqlens_q[0])
    for len_q, len_k, table in zip(lens_q, lens_k, block_table, strict=True):
        rows = slice(start, start + len_q)
        out[rows] = _attend(q[rows], k, v, table, len_k, softmax_scale, causal, window_size, softcap)
        start += len_q
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """q: [S, n, Hq, D], the last n tokens of sequences of cache_seqlens: [S] keys. Returns [S, n, Hq, D]."""
    _only_what_is_written(
        k=k, v=v, cos=rotary_cos, sin=rotary_sin, batch_idx=cache_batch_idx, leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes, lse=return_softmax_lse,
    )  # fmt: skip
    calls["kvcache"] += 1
    _check(q, k_cache, v_cache, block_table, len(q), q_dims=4)
    assert block_table is not None
    if not isinstance(cache_seqlens, Tensor):
        raise NotImplementedError("a test needs one length per sequence")
    _refuse(cache_seqlens.dtype != torch.int32, "cache_seqlens is not int32")
    _refuse(not cache_seqlens.is_contiguous(), "cache_seqlens is not contiguous")
    _refuse(cache_seqlens.shape != (len(q),), "cache_seqlens has another number of sequences")
    _refuse(num_splits > 128, "too many splits")
    outs = [
        _attend(one, k_cache, v_cache, table, keys, softmax_scale, causal, window_size, softcap)
        for one, table, keys in zip(q, block_table, cache_seqlens.tolist(), strict=True)
    ]
    return torch.stack(outs)


def _only_what_is_written(**options: Any) -> None:
    for name, value in options.items():
        if value is not None and value:
            raise NotImplementedError(f"{name}: Cabochon passes none")


def _refuse(is_wrong: bool, why: str) -> None:
    if is_wrong:
        raise RuntimeError(why)


def _check(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None, sequences: int, q_dims: int) -> None:
    if block_table is None:
        raise NotImplementedError("without pages")
    _refuse(q.dtype not in DTYPES, f"neither bf16 nor fp16 but {q.dtype}")
    _refuse({k.dtype, v.dtype} != {q.dtype}, "q, k and v differ in dtype")
    _refuse(any(one.stride(-1) != 1 for one in (k, v, block_table)), "the last dimension is not contiguous")
    _refuse(block_table.dtype != torch.int32, "block_table is not int32")
    _refuse(k.shape[1] % 256 != 0, f"pages of {k.shape[1]} tokens, no multiple of 256")
    _refuse(q.dim() != q_dims or k.dim() != 4 or k.shape != v.shape, "shapes do not fit")
    _refuse(q.shape[-1] != k.shape[-1] or q.shape[-1] > 256, "the head dimension does not fit")
    _refuse(q.shape[-2] % k.shape[-2] != 0, "heads of q are no multiple of those of k")
    _refuse(sequences < 1, "no sequences")
    _refuse(block_table.dim() != 2 or len(block_table) != sequences, "block_table has other sequences")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    num_keys: int,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    """q: [n, Hq, D], the last n of num_keys positions. Returns [n, Hq, D]."""
    n, left, right = len(q), window[0], 0 if causal else window[1]
    D, G = q.shape[-1], q.shape[1] // k.shape[2]
    assert num_keys <= len(table) * k.shape[1], "keys past the end of the table"
    key_tile = 256 if D <= 64 else 128 if D <= 128 else 64
    out = torch.zeros_like(q)
    for first in range(0, n, QUERY_TILE):
        rows = torch.arange(first, min(first + QUERY_TILE, n)) + num_keys - n  # diagonal at the bottom right
        low = 0 if left < 0 else max(int(rows[0]) - left, 0) // key_tile * key_tile
        high = num_keys
        if right >= 0:  # a tile of rows that is not full reaches as far as a full one
            high = min(-(-(int(rows[0]) + QUERY_TILE + right) // key_tile) * key_tile, num_keys)
        if low >= high:
            continue
        keys = torch.arange(low, high)
        pages, offsets = table[keys // k.shape[1]].long(), keys % k.shape[1]
        k_seen = k[pages, offsets].float().repeat_interleave(G, 1)  # [keys, Hq, D]
        v_seen = v[pages, offsets].float().repeat_interleave(G, 1)
        distance = keys[None, :] - rows[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            visible &= distance >= -left
        if right >= 0:
            visible &= distance <= right
        scores = torch.einsum("qhd,khd->hqk", q[first : first + QUERY_TILE].float(), k_seen)
        scores = scores * (D**-0.5 if scale is None else scale)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~visible.any(-1)[:, None], 0.0)  # a row that sees nothing is zero
        out[first : first + QUERY_TILE] = torch.einsum("hqk,khd->qhd", weights, v_seen).to(q.dtype)
    return out
