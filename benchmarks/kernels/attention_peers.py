"""Other people's attention on the benchmarks' problems: torch's flex_attention, FlashInfer.

Each makes a call that gives [S · queries, Hq, D], or None if the library is not there. Keys of flex_attention
are contiguous, those of FlashInfer are in our pages; fp8 pages are for neither.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from attention_problem import PAGE_TOKENS, Problem, contiguous_kv, optional
from torch import Tensor

WORKSPACE_BYTES = 2**28


@cache
def _flex() -> Any:
    """The compiled operator: eager, it multiplies everything with everything."""
    module = optional("torch.nn.attention.flex_attention")
    return None if module is None else torch.compile(module.flex_attention, dynamic=False)


def _softcap(cap: float | None) -> Callable[..., Tensor] | None:
    if cap is None:
        return None
    return lambda score, b, h, q, k: cap * torch.tanh(score / cap)


def flex_decode(problem: Problem) -> Callable[[], Tensor] | None:
    """Its FlexDecoding: one query a sequence. A window is a slice of the keys."""
    flex = _flex()
    if flex is None:
        return None
    k, v = contiguous_kv(problem)
    if problem.window is not None:
        k, v = k[:, -problem.window :].contiguous(), v[:, -problem.window :].contiguous()
    q, k, v = problem.q[:, :, None], k.transpose(1, 2), v.transpose(1, 2)  # [S, Hq | Hkv, 1 | keys, D]
    options = {"score_mod": _softcap(problem.heads.softcap), "scale": problem.heads.scale}
    return lambda: flex(q, k, v, enable_gqa=True, **options)[:, :, 0]


def flex_prefill(problem: Problem) -> Callable[[], Tensor] | None:
    """Causal and window as a mask of tiles, made before."""
    flex = _flex()
    if flex is None:
        return None
    module = optional("torch.nn.attention.flex_attention")
    assert module is not None
    skipped, window = problem.keys - problem.queries, problem.window

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        causal = k <= q + skipped
        return causal if window is None else causal & (k > q + skipped - window)

    mask = module.create_block_mask(
        visible, None, None, problem.queries, problem.keys, device=problem.q.device.type
    )
    q = problem.q.unflatten(0, (-1, problem.queries)).transpose(1, 2)  # [S, Hq, queries, D]
    k, v = (part.transpose(1, 2) for part in contiguous_kv(problem))
    options = {"score_mod": _softcap(problem.heads.softcap), "scale": problem.heads.scale, "block_mask": mask}
    return lambda: flex(q, k, v, enable_gqa=True, **options).transpose(1, 2).flatten(0, 1)


def _flashinfer_pages(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's pages begin, the pages, and how full the last ones are."""
    seqs, pages = problem.page_table.shape
    device = problem.q.device
    begins = torch.arange(seqs + 1, device=device, dtype=torch.int32) * pages
    last = torch.full((seqs,), (problem.keys - 1) % PAGE_TOKENS + 1, device=device, dtype=torch.int32)
    return begins, problem.page_table.flatten(), last


def _flashinfer_options(problem: Problem) -> dict[str, Any]:
    return {
        "sm_scale": problem.heads.scale,
        "logits_soft_cap": problem.heads.softcap or 0.0,
        "window_left": -1 if problem.window is None else problem.window - 1,
        "q_data_type": problem.q.dtype,
        "kv_data_type": problem.k_pages.dtype,
    }


def flashinfer_decode(problem: Problem) -> Callable[[], Tensor] | None:
    """Its batch decode over our pages; planned before."""
    library = optional("flashinfer")
    if library is None:
        return None
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=problem.q.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    heads = problem.heads
    wrapper.plan(
        *_flashinfer_pages(problem), heads.num_heads, heads.num_kv_heads, heads.head_dim, PAGE_TOKENS,
        **_flashinfer_options(problem),
    )  # fmt: skip
    return lambda: wrapper.run(problem.q, (problem.k_pages, problem.v_pages))


def flashinfer_prefill(problem: Problem) -> Callable[[], Tensor] | None:
    """Its batch prefill over our pages; planned before."""
    library = optional("flashinfer")
    if library is None:
        return None
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=problem.q.device)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    heads = problem.heads
    wrapper.plan(
        problem.cu_seqlens_q, *_flashinfer_pages(problem), heads.num_heads, heads.num_kv_heads,
        heads.head_dim, PAGE_TOKENS, causal=True, **_flashinfer_options(problem),
    )  # fmt: skip
    return lambda: wrapper.run(problem.q, (problem.k_pages, problem.v_pages))
