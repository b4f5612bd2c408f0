"""All layers of a Gemma step in one call of C, on the CPU: the kernels of this folder, one after the other.

Between the 160 calls of a step of one token Python takes its time and torch's threads fall asleep: 2 of 14 ms
with the demo in int8. The results are those of the single calls, bit for bit. Steps with adapters make
those.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.kernels.native.layers import LANES, MAX_HEAD_DIM
from cabochon.kernels.native.library import IS_FP32, check, check_floats, describe, function
from cabochon.kernels.native.quantize import PAIRS


class Weight(NamedTuple):
    """Of a product with n results of k elements: int8 [n, k'] with scales [n], or bf16 of linear.pack.

    The latter only if linear.can_multiply.
    """

    values: Tensor
    scales: Tensor | None = None


class LayerTensors(NamedTuple):
    """norms: of the input, after attention, before and after the MLP, [E] fp32, already 1 + w.

    head_norms: of Q and K, [D] fp32 likewise (Gemma 3), or None. weights: qkv, out, gate_up, down. angles:
    cos and sin, [max_len, D / 2] fp32. pages: K and V, [N, P, Hkv, D]. window: None if all keys are seen.
    """

    norms: tuple[Tensor, Tensor, Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    weights: tuple[Weight, Weight, Weight, Weight]
    angles: tuple[Tensor, Tensor]
    pages: tuple[Tensor, Tensor]
    group: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """E, F, Hq, Hkv, D as elsewhere; what is the same for all layers."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    attention_scale: float
    softcap: float | None


POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class _Weight(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("values", "scales")]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("norms", POINTER * 4),
        ("head_norms", POINTER * 2),
        ("weights", _Weight * 4),
        ("angles", POINTER * 2),
        ("pages", POINTER * 2),
        ("group", INT),
        ("window", INT),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("layers", "embedding")),
        *((name, FLOAT) for name in ("embedding_scale", "eps", "attention_scale", "softcap")),
        *((name, INT) for name in ("num_layers", "E", "F", "Hq", "Hkv", "D", "P", "is_fp32")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("token_ids", "positions", "slots", "page_tables")),
        *((name, POINTER) for name in ("cu_seqlens", "seq_lens", "residual")),
        *((name, INT) for name in ("T", "S", "M", "num_threads")),
    ]


class Forward:
    """The layers of a model whose K and V are in these pages. Holds what it is given."""

    def __init__(
        self, embedding: Tensor, embedding_scale: float, sizes: Sizes, layers: Sequence[LayerTensors]
    ) -> None:
        """embedding: [V, E], bf16 or fp32. Raises ValueError where something does not fit."""
        self._held = embedding, layers
        self._embedding = embedding
        self._num_groups = 1 + max(layer.group for layer in layers)
        for layer in layers:
            _check_layer(layer, embedding, sizes)
            check(layer.pages[0].shape == layers[0].pages[0].shape, *layer.pages)
        self._layers = (_Layer * len(layers))(*map(_layer_of, layers))
        self._model = _Model(
            ctypes.addressof(self._layers), embedding.data_ptr(),
            embedding_scale, sizes.eps, sizes.attention_scale, sizes.softcap or 0.0,
            len(layers), sizes.hidden, sizes.mlp, sizes.heads, sizes.kv_heads, sizes.head_dim,
            layers[0].pages[0].shape[1], IS_FP32[embedding.dtype],
        )  # fmt: skip

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        page_tables: Sequence[Tensor],
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
    ) -> Tensor:
        """Hidden rows before the final norm.

        token_ids, positions: [T] int64, each an id, and 0 for padding. slots: per group [T] int64, −1 for
        padding. page_tables: per group [S, M] int32. cu_seqlens_q: [S + 1], seq_lens: [S] int32, as
        native_attention's. Returns [T, E]. Raises ValueError if they do not fit, MemoryError.
        """
        check(len(slots) == len(page_tables) == self._num_groups and len(token_ids) > 0, self._embedding)
        T, S, M = len(token_ids), len(seq_lens), page_tables[0].shape[1]
        for ids in (token_ids, positions, *slots):
            _check_ids(ids, torch.int64, (T,))
        for ids, shape in ((cu_seqlens_q, (S + 1,)), (seq_lens, (S,)), *((x, (S, M)) for x in page_tables)):
            _check_ids(ids, torch.int32, shape)
        residual = self._embedding.new_empty((T, self._model.E))
        places = [_addresses(slots), _addresses(page_tables)]
        step = _Step(
            token_ids.data_ptr(), positions.data_ptr(), *map(ctypes.addressof, places),
            cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), residual.data_ptr(),
            T, S, M, torch.get_num_threads(),
        )  # fmt: skip
        status = function("cabochon_forward", "pp")(ctypes.addressof(self._model), ctypes.addressof(step))
        if status:
            raise MemoryError(f"a step of {T} tokens needs memory for attention and products")
        return residual


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (POINTER * len(tensors))(*(x.data_ptr() for x in tensors))


def _check_ids(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"indices must be contiguous {dtype} of {shape}, got {describe(x)}")


def _check_layer(layer: LayerTensors, embedding: Tensor, sizes: Sizes) -> None:
    E, F, D, Hq, Hkv = sizes.hidden, sizes.mlp, sizes.head_dim, sizes.heads, sizes.kv_heads
    (k_pages, v_pages), (cos, sin) = layer.pages, layer.angles
    fit = embedding.shape[1] == E and not any(size % LANES for size in (E, F, D)) and D <= MAX_HEAD_DIM
    fit = fit and k_pages.shape == v_pages.shape and k_pages.shape[2:] == (Hkv, D) and Hq % Hkv == 0
    check(
        fit and layer.group >= 0 and cos.shape == sin.shape == (len(cos), D // 2), embedding, k_pages, v_pages
    )
    for norm in layer.norms:
        check_floats(norm, E)
    for norm in layer.head_norms or ():
        check_floats(norm, D)
    for angles in layer.angles:
        check_floats(angles.view(-1), angles.numel())
    shapes = ((Hq + 2 * Hkv) * D, E), (E, Hq * D), (2 * F, E), (E, F)
    for weight, (n, k) in zip(layer.weights, shapes, strict=True):
        _check_weight(weight, n, k, embedding.dtype)


def _check_weight(weight: Weight, n: int, k: int, dtype: torch.dtype) -> None:
    values, scales = weight
    fits, shape, of = True, torch.Size((n, -(-k // PAIRS) * PAIRS)), torch.int8
    if scales is None:
        fits = n % LANES == 0 and dtype == torch.bfloat16
        shape, of = torch.Size((n // LANES, k // 2, LANES, 2)), torch.bfloat16
    else:
        check_floats(scales, n)
    if not fits or values.shape != shape or values.dtype != of or not values.is_contiguous():
        raise ValueError(f"a weight of {n} results must be a contiguous {shape} {of}, got {describe(values)}")


def _layer_of(layer: LayerTensors) -> _Layer:
    weights = [
        _Weight(values.data_ptr(), None if scales is None else scales.data_ptr())
        for values, scales in layer.weights
    ]
    return _Layer(
        _addresses(layer.norms), _addresses(layer.head_norms) if layer.head_norms else (None, None),
        (_Weight * 4)(*weights), _addresses(layer.angles), _addresses(layer.pages),
        layer.group, layer.window or 0,
    )  # fmt: skip
