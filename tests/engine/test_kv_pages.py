"""The memory of the pages: who owns which tensor, what is in it at first, and when it becomes resident."""

import gc
from pathlib import Path

import pytest
import torch
from random_gemma import BASE, model_config
from transformers import Gemma2Config, Gemma3TextConfig

from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import FP8, KVPages
from cabochon.engine.models.config import ModelConfig

CPU = torch.device("cpu")
MIB = 2**20


def gemma2() -> ModelConfig:
    return model_config(Gemma2Config(**BASE))


def pages_of(model: ModelConfig, num_pages: int, dtype: torch.dtype = torch.float32, P: int = 4) -> KVPages:
    layout = kv_layout(model, P, dtype.itemsize, has_scales=dtype == FP8)
    return KVPages(model, layout, num_pages, dtype, CPU)


def memory_mib() -> tuple[float, float]:
    """Address space and resident memory of this process."""
    space, resident, *_ = Path("/proc/self/statm").read_text().split()
    return int(space) * 4096 / MIB, int(resident) * 4096 / MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_zero_and_one_more_than_the_pool_counts(dtype: torch.dtype) -> None:
    pages = pages_of(gemma2(), 9, dtype)
    for tensor in (*pages.k, *pages.v):
        assert tensor.shape == (10, 4, 2, 16)
        assert tensor.dtype == dtype
        assert not tensor.any()


def test_fp8_pages_have_scales_which_are_zero_too() -> None:
    pages = pages_of(gemma2(), 9, FP8)
    assert len(pages.k_scales) == len(pages.v_scales) == len(pages.k) == 2
    for tensor in (*pages.k, *pages.v):
        assert tensor.shape == (10, 4, 2, 16)
        assert tensor.dtype == FP8
        assert not tensor.any()
    for scales in (*pages.k_scales, *pages.v_scales):
        assert scales.shape == (10, 4, 2)
        assert scales.dtype == torch.float32
        assert not scales.any()


def test_a_layer_finds_its_scales_beside_its_pages() -> None:
    pages = pages_of(gemma2(), 3, FP8)
    for layer, place in enumerate((0, 0, 1, 1)):
        found = pages.of_layer(layer)
        assert found.k_scales is pages.k_scales[place]
        assert found.v_scales is pages.v_scales[place]
    plain = pages_of(gemma2(), 3).of_layer(0)
    assert plain.k_scales is plain.v_scales is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("num_pages", [1, 9, 100])
def test_the_bytes_are_those_of_all_pages_and_the_null_page(num_pages: int, dtype: torch.dtype) -> None:
    pages = pages_of(gemma2(), num_pages, dtype)
    assert pages.num_bytes == (num_pages + 1) * pages.layout.page_bytes


def test_layers_of_two_groups_share_tensors_and_layers_of_one_do_not() -> None:
    pages = pages_of(gemma2(), 3)  # layers 0 and 2 slide, 1 and 3 are global
    groups, keys, values = zip(*(pages.of_layer(layer)[:3] for layer in range(4)), strict=True)
    assert groups == (0, 1, 0, 1)
    assert [k.data_ptr() for k in keys] == [pages.k[i].data_ptr() for i in (0, 0, 1, 1)]
    assert [v.data_ptr() for v in values] == [pages.v[i].data_ptr() for i in (0, 0, 1, 1)]
    assert len({tensor.data_ptr() for tensor in (*pages.k, *pages.v)}) == 4


def test_gemma3_layers_find_their_place_in_one_of_many_groups() -> None:
    model = model_config(Gemma3TextConfig(**{**BASE, "num_hidden_layers": 12}))
    pages = pages_of(model, 3)
    assert len(pages.k) == len(pages.v) == 2
    assert [pages.of_layer(layer)[0] for layer in range(12)] == [0, 0, 1, 1, 2, 5, 2, 3, 3, 4, 4, 5]


def test_what_is_written_stays_in_its_place() -> None:
    pages = pages_of(gemma2(), 3)
    pages.of_layer(2).k[3, 1] = 5
    assert pages.k[1].sum() == 5 * 2 * 16
    assert not pages.k[0].any()
    assert not any(v.any() for v in pages.v)


def test_memory_becomes_resident_as_pages_are_used() -> None:
    model = gemma2()
    page_bytes = kv_layout(model, 16, 4).page_bytes
    _, before = memory_mib()
    pages = pages_of(model, 512 * MIB // page_bytes, P=16)
    assert memory_mib()[1] - before < 64
    for tensor in (*pages.k, *pages.v):
        tensor[: len(tensor) // 4] = 1
    assert memory_mib()[1] - before > 100


def test_memory_goes_back_with_the_pages() -> None:
    model = gemma2()
    before, _ = memory_mib()
    pages = pages_of(model, 512 * MIB // kv_layout(model, 16, 4).page_bytes, P=16)
    assert memory_mib()[0] - before > 500
    del pages
    gc.collect()
    assert memory_mib()[0] - before < 64


def test_on_another_device_the_tensors_are_made_there() -> None:
    model = gemma2()
    layout = kv_layout(model, 16, 2)
    pages = KVPages(model, layout, 10, torch.bfloat16, torch.device("meta"))
    assert {tensor.device.type for tensor in (*pages.k, *pages.v)} == {"meta"}
    assert pages.num_bytes == 11 * layout.page_bytes


def test_scales_are_made_on_the_pages_device() -> None:
    model = gemma2()
    pages = KVPages(model, kv_layout(model, 16, 1, has_scales=True), 10, FP8, torch.device("meta"))
    assert {tensor.device.type for tensor in (*pages.k_scales, *pages.v_scales)} == {"meta"}
