"""Layer groups of the real models, and the pages that a sequence holds beside what the scheduler takes."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from paged_world import World, expected_output, prompt_of, request

from cabochon.engine.kv_cache import KVCache
from cabochon.engine.kv_layout import KVLayout, kv_layout
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.page_pool import PagePool
from cabochon.engine.request import Request
from cabochon.engine.rows import NULL_PAGE, Rows

BF16 = 2  # bytes
Windows = tuple[int | None, ...]


def model(is_sliding: list[bool], *, num_kv_heads: int, head_dim: int, window: int) -> ModelConfig:
    """Only what a layout reads is real."""
    return ModelConfig(
        architecture="", vocab_size=8, hidden_size=8, num_layers=len(is_sliding), num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, mlp_size=8, norm_eps=1e-6, attention_scale=1.0,
        attention_softcap=None, final_softcap=None, window=window, is_sliding=tuple(is_sliding),
        rope_theta_sliding=1e4, rope_theta_global=1e4, rope_factor_global=1.0, has_qk_norm=False,
        max_model_len=8192, eos_token_ids=(1,), bos_token_id=2,
    )  # fmt: skip


def gemma2(num_layers: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    is_sliding = [layer % 2 == 0 for layer in range(num_layers)]
    return model(is_sliding, num_kv_heads=num_kv_heads, head_dim=head_dim, window=4096)


def gemma3(num_layers: int) -> ModelConfig:
    """270M has 18 layers, 1B has 26."""
    is_sliding = [layer % 6 != 5 for layer in range(num_layers)]
    return model(is_sliding, num_kv_heads=1, head_dim=256, window=512)


GEMMA2 = {"2B": gemma2(26, 4, 256), "9B": gemma2(42, 8, 256), "27B": gemma2(46, 16, 128)}


def layout_of(windows: Windows, page_tokens: int) -> KVLayout:
    return KVLayout(windows=windows, place=(), layers_per_group=1, page_tokens=page_tokens, page_bytes=1)


@pytest.mark.parametrize(
    ("size", "layers", "page_bytes"), [("2B", 13, 851_968), ("9B", 21, 2_752_512), ("27B", 23, 3_014_656)]
)
def test_gemma2_has_two_groups_of_equal_size(size: str, layers: int, page_bytes: int) -> None:
    layout = kv_layout(GEMMA2[size], 16, BF16)
    assert layout.windows == (4096, None)
    assert layout.num_groups == 2
    assert layout.layers_per_group == layers
    assert layout.page_bytes == page_bytes  # K and V · layers · 16 tokens · Hkv · D · 2 bytes
    assert layout.place == tuple((layer % 2, layer // 2) for layer in range(2 * layers))


@pytest.mark.parametrize(("size", "page_bytes"), [("2B", 432_640), ("9B", 1_397_760), ("27B", 1_554_432)])
def test_fp8_pages_have_an_fp32_scale_per_token_and_kv_head(size: str, page_bytes: int) -> None:
    layout = kv_layout(GEMMA2[size], 16, 1, has_scales=True)
    assert layout.page_bytes == page_bytes  # K and V · layers · 16 tokens · Hkv · (D + 4)
    assert 1.93 < kv_layout(GEMMA2[size], 16, BF16).page_bytes / page_bytes < 1.97


def test_gemma3_270m_has_six_groups_of_three_layers() -> None:
    layout = kv_layout(gemma3(18), 16, BF16)
    assert layout.windows == (512, 512, 512, 512, 512, None)
    assert layout.layers_per_group == 3
    assert layout.page_bytes == 49_152  # 2 · 3 layers · 16 tokens · 256 · 2 bytes
    assert layout.place == (
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (5, 0),
        (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (5, 1),
        (3, 1), (3, 2), (4, 0), (4, 1), (4, 2), (5, 2),
    )  # fmt: skip


def test_the_last_sliding_group_may_be_short() -> None:
    layout = kv_layout(gemma3(26), 16, BF16)
    assert layout.layers_per_group == 4
    assert layout.windows == (*[512] * 6, None)
    assert [sum(group == g for group, _ in layout.place) for g in range(7)] == [4, 4, 4, 4, 4, 2, 4]


@pytest.mark.parametrize(("is_sliding", "windows"), [([True] * 4, (9,)), ([False] * 4, (None,))])
def test_layers_of_one_kind_are_one_group(is_sliding: list[bool], windows: Windows) -> None:
    layout = kv_layout(model(is_sliding, num_kv_heads=1, head_dim=8, window=9), 4, 4)
    assert layout.windows == windows
    assert layout.place == ((0, 0), (0, 1), (0, 2), (0, 3))


@given(st.lists(st.booleans(), min_size=1, max_size=40))
@settings(deadline=None)
def test_every_layer_has_a_place_of_its_own_in_a_group_of_its_kind(is_sliding: list[bool]) -> None:
    layout = kv_layout(model(is_sliding, num_kv_heads=1, head_dim=8, window=9), 4, 4)
    assert len(set(layout.place)) == len(layout.place) == len(is_sliding)
    for (group, index), slides in zip(layout.place, is_sliding, strict=True):
        assert (layout.windows[group] is not None) == slides
        assert index < layout.layers_per_group


@pytest.mark.parametrize(
    ("num_tokens", "chunk_tokens", "pages"),
    [
        # W = 6, P = 4. A decode at 12 sees 7..12, which is pages 1, 2 and 3.
        (1, 1, 1 + 1),
        (4, 1, 1 + 1),
        (5, 1, 2 + 2),
        (12, 1, 3 + 3),
        (13, 1, 4 + 3),
        (100, 1, 25 + 3),
        # a chunk 12..14 needs 7..14: pages 1, 2 and 3; 11..13 needs 6..13, the same
        (100, 3, 25 + 3),
        (100, 8, 25 + 5),
        (12, 100, 3 + 3),
    ],
)
def test_a_sequence_holds_all_global_pages_and_a_window_and_a_chunk_of_the_others(
    num_tokens: int, chunk_tokens: int, pages: int
) -> None:
    assert layout_of((6, None), 4).pages_per_sequence(num_tokens, chunk_tokens) == pages


@given(st.integers(1, 4000), st.integers(1, 2048), st.integers(1, 5000), st.sampled_from([1, 4, 16, 64]))
@settings(deadline=None)
def test_a_longer_sequence_never_needs_fewer_pages(length: int, chunk: int, window: int, page: int) -> None:
    layout = layout_of((window, None, window), page)
    shorter, longer = (layout.pages_per_sequence(n, chunk) for n in (length, length + 1))
    assert shorter <= longer <= 3 * -(-(length + 1) // page)


@given(
    window=st.one_of(st.none(), st.integers(1, 40)),
    page_tokens=st.sampled_from([1, 2, 4, 8]),
    chunk_tokens=st.integers(1, 30),
    num_tokens=st.integers(1, 60),
)
@settings(deadline=None)
def test_no_more_than_one_page_a_group_is_foreseen_in_vain(
    window: int | None, page_tokens: int, chunk_tokens: int, num_tokens: int
) -> None:
    needed = 0
    for start in range(num_tokens):  # a chunk, and the keys that its first query sees
        first = 0 if window is None else max(0, start - window + 1)
        end = min(num_tokens, start + chunk_tokens)
        needed = max(needed, len({position // page_tokens for position in range(first, end)}))
    foreseen = layout_of((window,), page_tokens).pages_per_sequence(num_tokens, chunk_tokens)
    assert needed <= foreseen <= needed + (window is not None)


@pytest.mark.parametrize("size", GEMMA2)
def test_hybrid_kv_of_8192_tokens_takes_a_quarter_less(size: str) -> None:
    layout = kv_layout(GEMMA2[size], 16, BF16)
    full = layout.num_groups * 8192 // 16 * layout.page_bytes
    hybrid = layout.pages_per_sequence(8192, chunk_tokens=1) * layout.page_bytes
    assert 1 - hybrid / full >= 0.249


def test_a_decoding_sequence_of_8192_tokens_really_holds_a_quarter_less() -> None:
    rows = Rows(max_seqs=1, max_model_len=8192, num_groups=2, page_tokens=16)
    pool = PagePool(1024)
    cache = KVCache(rows, pool, None, kv_layout(GEMMA2["2B"], 16, BF16).windows)
    sequence = Request(request("a", [3] * 8192), 0, 1, frozenset(), np.full(8192, 3, np.int32))
    row = rows.take([3] * 8192, 8192)
    for chunk in [512] * 15 + [1] * 512:
        assert cache.extend(row, chunk)
        highest = pool.num_used
        rows.num_computed[row] += chunk
        cache.commit({row: sequence}, np.array([row], np.int32))
    assert rows.num_computed[row] == 8192
    assert (rows.page_tables[:, row] != NULL_PAGE).sum(1).tolist() == [256, 512]
    assert 1 - highest / 1024 >= 0.249


LAYOUTS: list[Windows] = [
    (None,),
    (6,),
    (None, 6),
    (1, None),
    (5, None, 5),
    (3, 9),
    (2, 17, None),
    (40, None),
]


@given(
    windows=st.sampled_from(LAYOUTS),
    page_tokens=st.sampled_from([1, 2, 4, 8]),
    step_tokens=st.integers(1, 24),
    prompt_len=st.integers(1, 47),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_the_scheduler_takes_no_more_pages_than_foreseen(
    windows: Windows, page_tokens: int, step_tokens: int, prompt_len: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(prompt_len + 1, 48))
    bound = layout_of(windows, page_tokens).pages_per_sequence(length, step_tokens)
    world = World(
        num_pages=bound, page_tokens=page_tokens, windows=windows, max_seqs=1, step_tokens=step_tokens
    )
    for name in ("fresh", "cached"):  # the second starts from a prefix hit
        world.add(request(name, prompt_of(prompt_len), length - prompt_len, ignore_eos=True))
        world.run()
        assert world.outputs[name] == expected_output(
            prompt_of(prompt_len), length - prompt_len, ignore_eos=True
        )
    assert world.scheduler.stats().preemptions == 0
