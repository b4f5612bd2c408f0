"""The inputs of a decode step from the rows on the device, and the rows' new tokens: the host knows neither.

Math     n = num_tokens[row]; the last known token stands at position n − 1; its slot is page · P + offset,
         with page = page_tables[group, row, position // P]; it sees n keys
Grid     prepare: (sequence s, layer group); append: tiles of sequences
Traffic  2 · 4 bytes per held page and group, some tens of bytes per sequence
Padding  a row id of −1 gives token 0 at position 0, no keys and the slot −1, which is never written
The definition is engine/attention.py, TorchAttention.prepare, and engine/runner.py, for decodes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cabochon.kernels.ahead_of_time import CompileSpec, on_every_sm

BLOCK_M = 128  # pages copied at once: 2048 tokens
BLOCK_S = 256


class DecodeInputs(NamedTuple):
    """Buffers of one graph size S, reused by every step.

    token_ids, positions: [S] int64. seq_lens: [S] int32, the key count. slots: [num_groups, S] int64.
    page_tables: [num_groups, S, M] int32; only entries that hold the seq_lens tokens are written.
    """

    token_ids: Tensor
    positions: Tensor
    seq_lens: Tensor
    slots: Tensor
    page_tables: Tensor


def decode_inputs(num_seqs: int, num_groups: int, pages_per_seq: int, device: torch.device) -> DecodeInputs:
    """Allocate the buffers of `num_seqs` decodes: all padding, all null pages."""
    return DecodeInputs(
        torch.zeros(num_seqs, dtype=torch.int64, device=device),
        torch.zeros(num_seqs, dtype=torch.int64, device=device),
        torch.zeros(num_seqs, dtype=torch.int32, device=device),
        torch.full((num_groups, num_seqs), -1, dtype=torch.int64, device=device),
        torch.zeros((num_groups, num_seqs, pages_per_seq), dtype=torch.int32, device=device),
    )


def prepare_decodes(
    row_ids: Tensor,
    token_ids: Tensor,
    num_tokens: Tensor,
    page_tables: Tensor,
    page_tokens: int,
    *,
    out: DecodeInputs,
) -> None:
    """Fill `out` for one decode per row.

    row_ids: [S] int32, −1 for padding. token_ids: [max_seqs, max_model_len] int32. num_tokens: [max_seqs]
    int32, ≥ 1. page_tables: [num_groups, max_seqs, M] int32; a token whose page is the null page 0 gets the
    slot −1, so that page 0 stays zero. Raises ValueError if shapes disagree.
    """
    S = len(row_ids)
    groups, _, M = page_tables.shape
    if out.page_tables.shape != (groups, S, M) or out.slots.shape != (groups, S):
        raise ValueError(
            f"buffers must be of {groups} groups, {S} sequences and {M} pages, "
            f"got {list(out.page_tables.shape)} and {list(out.slots.shape)}"
        )
    if token_ids.stride(1) != 1 or page_tables.stride(2) != 1:
        raise ValueError("rows of token_ids and page_tables must be contiguous")
    _prepare_kernel[(S, groups)](
        row_ids, token_ids, num_tokens, page_tables, *out,
        token_ids.stride(0), *page_tables.stride()[:2], out.slots.stride(0), *out.page_tables.stride()[:2],
        P=page_tokens, BLOCK_M=BLOCK_M,
    )  # fmt: skip


def prepare_decodes_reference(
    row_ids: Tensor, token_ids: Tensor, num_tokens: Tensor, page_tables: Tensor, page_tokens: int
) -> DecodeInputs:
    """The definition, without the page tables' unwritten entries (they are those of the rows)."""
    is_row = row_ids >= 0
    rows = row_ids.clamp(min=0).long()
    positions = (num_tokens[rows].long() - 1) * is_row
    pages = page_tables[:, rows, positions // page_tokens].long()
    slots = torch.where(is_row & (pages != 0), pages * page_tokens + positions % page_tokens, -1)
    return DecodeInputs(
        token_ids[rows, positions].long() * is_row,
        positions,
        (num_tokens[rows] * is_row).int(),
        slots,
        page_tables[:, rows],
    )


def append_tokens(row_ids: Tensor, sampled: Tensor, token_ids: Tensor, num_tokens: Tensor) -> None:
    """Enter the sampled tokens into their rows, in place.

    row_ids: [S] int32, distinct or −1. sampled: [S] int32; below 0 the row gets no token (padding, a grammar
    that is late). token_ids: [max_seqs, max_model_len] int32. num_tokens: [max_seqs] int32; a full row
    stays as it is.
    """
    S = len(row_ids)
    _append_kernel[(triton.cdiv(S, BLOCK_S),)](
        row_ids, sampled, token_ids, num_tokens, token_ids.stride(0), token_ids.shape[1], S, BLOCK_S=BLOCK_S
    )


@triton.jit
def _prepare_kernel(
    row_ids_ptr, rows_token_ids_ptr, num_tokens_ptr, rows_page_tables_ptr,
    token_ids_ptr, positions_ptr, seq_lens_ptr, slots_ptr, page_tables_ptr,
    rows_token_ids_stride, rows_group_stride, rows_page_tables_stride, slots_stride,
    group_stride, page_tables_stride,
    P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    s, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(row_ids_ptr + s).to(tl.int64)  # int64: rows · M and rows · max_model_len are large
    is_row = row >= 0
    num_tokens = tl.load(num_tokens_ptr + row, mask=is_row, other=0)
    position = tl.maximum(num_tokens - 1, 0)
    from_ptr = rows_page_tables_ptr + group * rows_group_stride + row * rows_page_tables_stride
    page = tl.load(from_ptr + position // P, mask=is_row, other=0).to(tl.int64)
    slot = tl.where(page > 0, page * P + position % P, -1)
    tl.store(slots_ptr + group * slots_stride + s, slot)
    if group == 0:
        token_ptr = rows_token_ids_ptr + row * rows_token_ids_stride + position
        tl.store(token_ids_ptr + s, tl.load(token_ptr, mask=is_row, other=0).to(tl.int64))
        tl.store(positions_ptr + s, position.to(tl.int64))
        tl.store(seq_lens_ptr + s, num_tokens)
    to_ptr = page_tables_ptr + group * group_stride + s.to(tl.int64) * page_tables_stride
    num_pages = (num_tokens + P - 1) // P
    for start in range(0, num_pages, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        held = m < num_pages
        tl.store(to_ptr + m, tl.load(from_ptr + m, mask=held, other=0), mask=held)


@triton.jit
def _append_kernel(
    row_ids_ptr, sampled_ptr, token_ids_ptr, num_tokens_ptr, token_ids_stride, max_len, S,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = s < S
    row = tl.load(row_ids_ptr + s, mask=valid, other=-1).to(tl.int64)
    token = tl.load(sampled_ptr + s, mask=valid, other=-1)
    given = (row >= 0) & (token >= 0)
    num_tokens = tl.load(num_tokens_ptr + row, mask=given, other=0)
    fits = given & (num_tokens < max_len)
    tl.store(token_ids_ptr + row * token_ids_stride + num_tokens, token, mask=fits)
    tl.store(num_tokens_ptr + row, num_tokens + 1, mask=fits)


def compile_specs() -> list[CompileSpec]:
    """Both kernels."""
    prepare = (*["*i32"] * 4, "*i64", "*i64", "*i32", "*i64", "*i32", *["i32"] * 6)
    append = (*["*i32"] * 4, *["i32"] * 3)
    return [
        *on_every_sm(_prepare_kernel, prepare, 4, {"P": 16, "BLOCK_M": BLOCK_M}),
        *on_every_sm(_append_kernel, append, 4, {"BLOCK_S": BLOCK_S}),
    ]
