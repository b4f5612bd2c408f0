"""What stands between the matrix products of a Gemma layer, in C on the CPU: one pass each.

Names, arguments and rounding are those of the Triton kernels (embed_norm, rms_norm, sandwich_norm, geglu,
qkv_rope_write); the definitions are definitions.py's. A row's bits depend on nothing but the row.
Traffic  that of the Triton kernels: torch's operators on their own make about thirty passes a layer
"""

import torch
from torch import Tensor

from cabochon.kernels.native.library import check, check_floats, function, how

LANES = 16  # of a vector: rows and heads are multiples
MAX_HEAD_DIM = 512


def rms_norm(x: Tensor, unit_offset_weight: Tensor, eps: float, *, out: Tensor) -> None:
    """Normalize each row: x · (mean(x²) + eps)^-½ · (1 + w).

    x, out: [T, E], bf16 or fp32, E a multiple of 16. unit_offset_weight: [E] fp32, already 1 + w.
    Raises ValueError if they do not fit.
    """
    T, E = x.shape
    check(out.shape == x.shape and E % LANES == 0, x, out)
    check_floats(unit_offset_weight, E)
    function("cabochon_rms_norm", "pppfiiii")(
        x.data_ptr(), unit_offset_weight.data_ptr(), out.data_ptr(), eps, T, E, *how(x)
    )


def embed_norm(
    token_ids: Tensor,
    embedding: Tensor,
    scale: float,
    unit_offset_weight: Tensor,
    eps: float,
    *,
    residual_out: Tensor,
    x_out: Tensor,
) -> None:
    """Look up, scale and normalize the rows of `token_ids`.

    token_ids: [T] int64, each in [0, V). embedding: [V, E]. scale: representable in its dtype.
    unit_offset_weight: [E] fp32. residual_out, x_out: [T, E]. Raises ValueError if they do not fit.
    """
    T, E = residual_out.shape
    fits = x_out.shape == (T, E) and embedding.shape[1] == E and E % LANES == 0
    check(fits and _are_ids(token_ids, T), embedding, residual_out, x_out)
    check_floats(unit_offset_weight, E)
    function("cabochon_embed_norm", "ppfpppfiiii")(
        token_ids.data_ptr(), embedding.data_ptr(), scale, unit_offset_weight.data_ptr(),
        residual_out.data_ptr(), x_out.data_ptr(), eps, T, E, *how(embedding),
    )  # fmt: skip


def sandwich_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor | None,
    eps: float,
    *,
    residual_out: Tensor,
    x_out: Tensor | None,
) -> None:
    """Add the normalized branch to the residual, and normalize the sum for the next branch.

    branch, residual, x_out: [T, E]; residual_out must be residual. post_weight, pre_weight: [E] fp32, already
    1 + w. No pre_weight (after the last layer): no x_out. Raises ValueError if they do not fit.
    """
    T, E = branch.shape
    x = residual if x_out is None else x_out
    fits = residual.shape == x.shape == (T, E) and E % LANES == 0 and (pre_weight is None) == (x_out is None)
    check(fits and residual_out is residual, branch, residual, x)
    check_floats(post_weight, E)
    if pre_weight is not None:
        check_floats(pre_weight, E)
    function("cabochon_sandwich_norm", "pppppfiiii")(
        branch.data_ptr(), residual.data_ptr(), post_weight.data_ptr(),
        pre_weight.data_ptr() if pre_weight is not None else None,
        x_out.data_ptr() if x_out is not None else None, eps, T, E, *how(branch),
    )  # fmt: skip


def geglu(gate_up: Tensor, *, out: Tensor) -> None:
    """gelu(gate) · up, gelu with tanh, rounded before the product.

    gate_up: [T, 2 F], gate first. out: [T, F], F a multiple of 16. Raises ValueError if they do not fit.
    """
    T, F = out.shape
    check(gate_up.shape == (T, 2 * F) and F % LANES == 0, gate_up, out)
    function("cabochon_geglu", "ppiiii")(gate_up.data_ptr(), out.data_ptr(), T, F, *how(gate_up))


def qkv_rope_write(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    *,
    q_out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Normalize (Gemma 3) and rotate queries and keys; write keys and values to the tokens' slots.

    qkv: [T, (Hq + 2 Hkv) · D]. positions: [T] int64, 0 for padding. cos, sin: [max_len, D / 2] fp32.
    slots: [T] int64, page · P + offset; −1 is never written. q_out: [T, Hq, D]. k_pages, v_pages:
    [N, P, Hkv, D] of qkv's dtype, no scales. q_norm, k_norm: [D] fp32, already 1 + w, both or neither;
    eps is theirs. Raises ValueError if they do not fit.
    """
    T, Hq, D = q_out.shape
    Hkv = k_pages.shape[2]
    fits = qkv.shape == (T, (Hq + 2 * Hkv) * D) and k_pages.shape == v_pages.shape and k_pages.shape[3] == D
    fits = fits and D % LANES == 0 and D <= MAX_HEAD_DIM and k_scales is None and v_scales is None
    fits = fits and _are_ids(positions, T) and _are_ids(slots, T) and (q_norm is None) == (k_norm is None)
    fits = fits and cos.shape == sin.shape and cos.shape[1] == D // 2 and cos.dtype == torch.float32
    check(fits and cos.is_contiguous() and sin.is_contiguous(), qkv, q_out, k_pages, v_pages)
    for weight in (q_norm, k_norm):
        if weight is not None:
            check_floats(weight, D)
    norms = (None if weight is None else weight.data_ptr() for weight in (q_norm, k_norm))
    function("cabochon_qkv_rope_write", "ppppppppppfiiiiii")(
        qkv.data_ptr(), positions.data_ptr(), slots.data_ptr(), cos.data_ptr(), sin.data_ptr(), *norms,
        q_out.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), eps, T, Hq, Hkv, D, *how(qkv),
    )  # fmt: skip


def _are_ids(x: Tensor, size: int) -> bool:
    return x.shape == (size,) and x.dtype == torch.int64 and x.is_contiguous()
