"""Attention over paged K and V: the torch definition, any device.

Math     out = softmax(mask(cap(scale · q Kᵀ))) V; key k is visible to query q iff q − W < k <= q
Tiles    keys come in tiles of `key_tile` at absolute positions; a row's sums are one partial per tile, added
         in the order of the tiles. Tiles that a row does not see add an exact zero, so its result does not
         depend on how the prompt was cut, on its neighbours, nor on whether it is computed as a decode or as
         part of a prefill.
Max      with a cap the scores are bounded and need no maximum; without one the maximum is exact in any order
Invisible keys are read from slot 0, which belongs to the null page and is zero: recycled pages may hold NaN.
Never copied per query head, never a mask over the batch. Knows nothing of requests.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.kernels.definitions import softcap_

KEY_TILE = 256  # keys a tile: smaller wastes less on short contexts, larger has fewer partial sums
QUERY_TILE = 128  # tokens of a prefill that share one score matrix
MAX_GATHER_BYTES = (
    4 * 2**20
)  # of fp32 K at once for decodes, so that it stays in the cache: 64 × 1000 keys took 3 ×
ROW_MULTIPLE = 4  # GEMM rows: on x86 a row's result is the same for every multiple of 4, and differs below


@dataclass(frozen=True, slots=True)
class Mask:
    """Invisible keys in columns start..end of a score matrix: is_hidden [rows, end - start] bool."""

    start: int
    end: int
    is_hidden: Tensor


@dataclass(frozen=True, slots=True)
class Section:
    """Sequences (decodes) or query tiles (prefill) that share one gather of keys.

    tokens: half-open range of packed tokens; num_seqs sequences of equal length in it.
    slots:  [num_seqs · Hkv · nk] int64, rows of the flat K and V: (page · P + offset) · Hkv + head
    """

    start: int
    end: int
    num_seqs: int
    num_keys: int
    slots: Tensor
    masks: list[Mask]


def plan_sections(
    starts: NDArray[np.int32],
    lens: NDArray[np.int32],
    num_decodes: int,
    page_table: NDArray[np.int32],
    *,
    page_tokens: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
) -> list[Section]:
    """Lay out one step for one layer group: all index work, done once for its layers.

    starts, lens: [S], positions starts[i] .. starts[i] + lens[i] are computed; the first num_decodes have
    lens 1. page_table: [S, M] int32, holding the pages of positions below starts + lens. window: W, or None
    for all keys.
    """
    layout = _Layout(page_table, page_tokens, num_kv_heads, head_dim, window, max(KEY_TILE, page_tokens))
    sections = list(_decode_sections(layout, starts[:num_decodes]))
    token = num_decodes
    for seq in range(num_decodes, len(starts)):
        sections += _prefill_sections(layout, seq, int(starts[seq]), int(lens[seq]), token)
        token += int(lens[seq])
    return sections


@dataclass(frozen=True, slots=True)
class _Layout:
    page_table: NDArray[np.int32]
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    key_tile: int

    def first_tile(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tile with the first key that a query at `position` sees."""
        low = 0 * position if self.window is None else np.maximum(position - self.window + 1, 0)
        return low // self.key_tile

    def slots(self, seqs: NDArray[np.int64], keys: NDArray[np.int64], is_seen: NDArray[np.bool_]) -> Tensor:
        """Flat K/V rows of keys [B, nk] of sequences [B]; keys that nobody sees read the zero of slot 0."""
        page_idx = np.minimum(keys // self.page_tokens, self.page_table.shape[1] - 1)
        pages = self.page_table[seqs[:, None], page_idx].astype(
            np.int64
        )  # int64: N · P · Hkv passes 2³¹ at 27B
        slots = np.where(is_seen, pages * self.page_tokens + keys % self.page_tokens, 0)  # [B, nk]
        rows = (
            slots[:, None] * self.num_kv_heads + np.arange(self.num_kv_heads)[None, :, None]
        )  # [B, Hkv, nk]
        return torch.from_numpy(rows.reshape(-1))


def _decode_sections(layout: _Layout, positions: NDArray[np.int32]) -> Iterator[Section]:
    """Runs of neighbouring decodes with the same number of tiles: no context is padded to another's."""
    pos = positions.astype(np.int64)
    first = layout.first_tile(pos)
    num_tiles = pos // layout.key_tile + 1 - first
    start = 0
    max_keys = MAX_GATHER_BYTES // (layout.num_kv_heads * layout.head_dim * 4)
    while start < len(pos):
        num_keys = int(num_tiles[start]) * layout.key_tile
        end = start + 1
        while (
            end < len(pos) and num_tiles[end] == num_tiles[start] and (end - start + 1) * num_keys <= max_keys
        ):
            end += 1
        run = slice(start, end)
        keys = first[run, None] * layout.key_tile + np.arange(num_keys)  # [B, nk]
        is_seen = keys <= pos[run, None]
        if layout.window is not None:
            is_seen &= keys > pos[run, None] - layout.window
        slots = layout.slots(np.arange(start, end), keys, is_seen)
        hidden = torch.from_numpy(~is_seen)
        yield Section(start, end, end - start, num_keys, slots, [Mask(0, num_keys, hidden)])
        start = end


def _prefill_sections(layout: _Layout, seq: int, start: int, length: int, token: int) -> Iterator[Section]:
    for offset in range(0, length, QUERY_TILE):
        end_offset = min(offset + QUERY_TILE, length)
        queries = np.arange(start + offset, start + end_offset, dtype=np.int64)
        first_key = int(layout.first_tile(queries[:1])[0]) * layout.key_tile
        num_keys = (int(queries[-1]) // layout.key_tile + 1) * layout.key_tile - first_key
        keys = first_key + np.arange(num_keys, dtype=np.int64)
        is_seen = keys <= queries[-1]
        if layout.window is not None:
            is_seen &= keys > queries[0] - layout.window
        yield Section(
            token + offset,
            token + end_offset,
            1,
            num_keys,
            layout.slots(np.array([seq]), keys[None], is_seen[None]),
            list(_edge_masks(layout.window, queries, keys)),
        )


def _edge_masks(window: int | None, queries: NDArray[np.int64], keys: NDArray[np.int64]) -> Iterator[Mask]:
    """Masks only where the diagonal or the window's edge passes: interior keys are visible to every query."""
    diagonal = int(np.searchsorted(keys, queries[0], side="right"))
    if diagonal < len(keys):
        hidden = keys[None, diagonal:] > queries[:, None]
        yield Mask(diagonal, len(keys), torch.from_numpy(hidden))
    if window is not None:
        edge = int(np.searchsorted(keys, queries[-1] - window, side="right"))
        if edge > 0:
            hidden = keys[None, :edge] <= queries[:, None] - window
            yield Mask(0, edge, torch.from_numpy(hidden))


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    sections: list[Section],
    *,
    scale: float,
    softcap: float | None,
    key_tile: int = KEY_TILE,
) -> Tensor:
    """Attend every packed token to its visible keys.

    q: [T, Hq, D]. k_pages, v_pages: [N, P, Hkv, D]; page 0 must be zero. sections: from `plan_sections`, made
    with a page size ≤ key_tile or equal to it. Returns [T, Hq, D] in q's dtype; tokens outside every section
    are zero.
    """
    num_kv_heads, head_dim = k_pages.shape[2:]
    k_rows, v_rows = k_pages.view(-1, head_dim), v_pages.view(-1, head_dim)
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    for section in sections:
        shape = (section.num_seqs * num_kv_heads, section.num_keys, head_dim)
        k = k_rows.index_select(0, section.slots).view(shape).to(compute)  # [B Hkv, nk, D]
        v = v_rows.index_select(0, section.slots).view(shape).to(compute)
        part = q[section.start : section.end].to(compute) * scale
        out[section.start : section.end] = _attend(part, k, v, section, num_kv_heads, softcap, key_tile)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, section: Section, num_kv_heads: int, softcap: float | None, key_tile: int
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    batch = section.num_seqs
    per_seq, group = num_tokens // batch, num_heads // num_kv_heads
    rows = per_seq * group
    q = q.view(batch, per_seq, num_kv_heads, group, head_dim).transpose(1, 2)
    q = q.reshape(batch * num_kv_heads, rows, head_dim)  # [B Hkv, n G, D]
    if rows % ROW_MULTIPLE:
        q = torch.nn.functional.pad(q, (0, 0, 0, -rows % ROW_MULTIPLE))
    scores = torch.bmm(q, k.mT)[:, :rows]  # [B Hkv, n G, nk]
    if softcap is not None:
        scores = softcap_(scores, softcap)
    view = torch.unflatten(torch.unflatten(scores, 1, (per_seq, group)), 0, (batch, num_kv_heads))
    for mask in section.masks:
        hidden = mask.is_hidden.view(batch, 1, per_seq, 1, mask.end - mask.start)
        view[..., mask.start : mask.end].masked_fill_(hidden, -torch.inf)
    if softcap is None:
        scores = scores - scores.amax(-1, keepdim=True)
    p = scores.exp_()
    total, acc = _sum_tiles(p, v, key_tile)
    acc = acc[:, :rows] / total[..., None]  # [B Hkv, n G, D]
    acc = acc.view(batch, num_kv_heads, per_seq, group, head_dim).transpose(1, 2)
    return acc.reshape(num_tokens, num_heads, head_dim)


def _sum_tiles(p: Tensor, v: Tensor, key_tile: int) -> tuple[Tensor, Tensor]:
    """Σ p [.., rows] and Σ p·v [.., rows padded, D], a partial per tile, added in the order of the tiles."""
    rows = p.shape[1]
    padded = torch.nn.functional.pad(p, (0, 0, 0, -rows % ROW_MULTIPLE)) if rows % ROW_MULTIPLE else p
    total, acc = p[..., :key_tile].sum(-1), torch.bmm(padded[..., :key_tile], v[:, :key_tile])
    for start in range(key_tile, p.shape[2], key_tile):
        tile = slice(start, start + key_tile)
        total, acc = total + p[..., tile].sum(-1), acc + torch.bmm(padded[..., tile], v[:, tile])
    return total, acc


def paged_attention_reference(
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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """The GPU kernels' definition, in q's own precision: .double() for the truth, else for the error budget.

    q: [T, Hq, D]. k_pages, v_pages: [N, P, Hkv, D], with k_scales, v_scales: [N, P, Hkv] or without; page 0
    must be zero. page_table: [S, M] int32. cu_seqlens_q: [S + 1] int32. seq_lens: [S] int32. Returns
    [T, Hq, D] in q's dtype.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    if k_scales is not None and v_scales is not None:
        k_pages = k_pages.to(compute) * k_scales[..., None].to(compute)
        v_pages = v_pages.to(compute) * v_scales[..., None].to(compute)
    lens = np.diff(cu_seqlens_q.numpy())
    sections = plan_sections(
        seq_lens.numpy() - lens,
        lens,
        0,
        page_table.numpy(),
        page_tokens=k_pages.shape[1],
        num_kv_heads=k_pages.shape[2],
        head_dim=k_pages.shape[3],
        window=window,
    )
    return paged_attention(q, k_pages, v_pages, sections, scale=scale, softcap=softcap)
