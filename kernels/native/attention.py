"""Attention over paged K and V in C on the CPU: decodes and prefills in one call.

Math     out = softmax(cap(scale · q Kᵀ)) V over the keys k with q − W < k <= q, all of it in fp32
Traffic  a unit of 16 query rows (tokens × the heads that share a KV head) reads each visible key once; its
         scores stay in the L2 cache up to about 16,000 keys
Bits     a token's result depends on its query and its keys alone (kernels/native/attention.c says why)
Source   the definition is paged_attention.paged_attention_reference
"""

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES, MAX_HEAD_DIM
from cabochon.kernels.native.library import check, describe, function, how


def native_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    out: Tensor,
) -> None:
    """Attend the last tokens of each sequence to its keys, their own included, all read from pages.

    q, out: [T, Hq, D], bf16 or fp32, D a multiple of 16 up to 512; rows of no sequence are left as they are.
    k_pages, v_pages: [N, P, Hkv, D] in q's dtype. page_table: [S, M] int32. cu_seqlens_q: [S + 1] int32,
    seq_lens: [S] int32, keys of each sequence. Raises ValueError if they do not fit, MemoryError.
    """
    (T, Hq, D), (_, P, Hkv, _), S = q.shape, k_pages.shape, len(seq_lens)
    fits = k_pages.shape == v_pages.shape and k_pages.shape[3] == D and Hq % Hkv == 0
    fits = fits and D % LANES == 0 and D <= MAX_HEAD_DIM and out.shape == q.shape
    check(fits, q, k_pages, v_pages, out)
    for x, shape in ((page_table, (S, page_table.shape[1])), (cu_seqlens_q, (S + 1,)), (seq_lens, (S,))):
        if x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(f"indices must be contiguous int32 of {shape}, got {describe(x)}")
    status = function("cabochon_paged_attention", "pppppppffiiiiiiiii")(
        q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), page_table.data_ptr(), cu_seqlens_q.data_ptr(),
        seq_lens.data_ptr(), out.data_ptr(), scale, softcap or 0.0, S, page_table.shape[1], P, Hq, Hkv, D,
        window or 0, *how(q),
    )  # fmt: skip
    if status:
        raise MemoryError(f"attention of {T} tokens needs memory for its units")
