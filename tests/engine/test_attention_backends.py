"""One set of cases for every backend, driven as the engine drives it; free pages hold NaN all the while."""

import fake_flash_attn
import pytest
import torch
from attention_world import GLOBAL, SLIDING, AttentionWorld

from cabochon.engine.attention import Backend

BACKENDS = [("torch", 4), ("torch", 256), ("native", 4), ("native", 256), ("triton", 4), ("flash-attn", 256)]


@pytest.fixture(params=BACKENDS, ids=lambda param: f"{param[0]}-{param[1]}")
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Backend, int]:
    name, page_tokens = request.param
    if name == "triton":
        request.getfixturevalue("triton_interpreter")
    if name == "flash-attn":
        request.getfixturevalue("fake_flash")
        monkeypatch.setattr(fake_flash_attn, "DTYPES", fake_flash_attn.DTYPES | {torch.float32})
    return name, page_tokens


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window_pages", [0.75, 1, 2.5, 100])
def test_chunks_decodes_and_both_in_one_step_equal_the_definition(
    backend: tuple[Backend, int], softcap: float | None, window_pages: float
) -> None:
    P = backend[1]
    world = AttentionWorld(*backend, window=int(window_pages * P), softcap=softcap)
    world.step((3, P + 1), (0, 1), (1, P), (4, P - 1))  # prefills alone
    world.step((0, 1), (1, 1), (2, 2 * P + 3), (4, 1), (3, P), num_decodes=2, padding=2)  # (4, 1) is a chunk
    world.step((0, 1), (1, 1), (4, 1), (2, 1), num_decodes=4)  # decodes alone
    world.step((0, 1), (3, 1), (2, P), num_decodes=2, padding=1)
    world.step((0, 1), (1, 1), (3, 1), (2, 1), (4, 1), num_decodes=5, padding=3)


def test_what_is_hidden_weighs_nothing_under_a_small_cap(backend: tuple[Backend, int]) -> None:
    """Were the mask before the cap, hidden keys would weigh exp(-cap), which a cap of 50 conceals."""
    P = backend[1]
    world = AttentionWorld(*backend, window=P - 1, softcap=1.0)
    world.step((0, 2 * P + 1), (1, 3))
    world.step((0, 1), (1, P), num_decodes=1)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)])
def test_query_heads_share_their_kv_head(backend: tuple[Backend, int], heads: tuple[int, int]) -> None:
    P = backend[1]
    world = AttentionWorld(*backend, window=P + 1, heads=heads)
    world.step((0, 2 * P), (1, 5))
    world.step((0, 1), (1, P), num_decodes=1)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_heads_of_the_real_sizes_in_half_precision(backend: tuple[Backend, int], head_dim: int) -> None:
    P = backend[1]
    world = AttentionWorld(*backend, window=P + 1, head_dim=head_dim, heads=(2, 1), dtype=torch.bfloat16)
    world.step((0, 2 * P + 1), (1, 5))
    world.step((0, 1), (1, 2 * P), num_decodes=1, padding=1)


def test_the_window_holds_w_keys_and_the_query_is_one_of_them(backend: tuple[Backend, int]) -> None:
    """Equal weights, and V counts the key: the mean over k in (q - W, q] is q - (W - 1) / 2."""
    P = backend[1]
    for window in (1, P - 1, P, P + 1, 2 * P):
        world = AttentionWorld(*backend, window=window)
        for work, num_decodes in (((0, 2 * P), 0), ((0, 1), 1)):
            plan = world._plan((work,), num_decodes)
            inputs = world.attention.prepare(plan, world.rows)
            positions = torch.arange(plan.starts[0], plan.starts[0] + plan.lens[0], dtype=torch.float32)
            v = positions[:, None, None].expand(-1, 2, 16).contiguous()
            q, k = torch.zeros(len(v), 4, 16), torch.randn(v.shape, generator=world.g)
            for layer, seen in ((SLIDING, positions.clamp(max=window - 1)), (GLOBAL, positions)):
                out = world.run(layer, plan, q, k, v, inputs)
                expected = (positions - seen / 2)[:, None, None].expand_as(out)
                torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
            world.rows.num_computed[0] += plan.lens[0]


@pytest.mark.parametrize("chunks", [(1,) * 3, (2, 7, 1), "pages"], ids=str)
def test_a_prompt_in_chunks_gives_what_it_gives_at_once(
    backend: tuple[Backend, int], chunks: tuple[int, ...] | str
) -> None:
    P = backend[1]
    lens = (P, P - 1, P + 2) if chunks == "pages" else tuple(n * P // 4 for n in chunks)
    total = sum(lens)
    q, k, v = (torch.randn(total, n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    outs = []
    for cuts in (lens, (total,)):
        world, parts, start = AttentionWorld(*backend, window=P + 2), [], 0
        for n in cuts:
            plan = world._plan(((0, n),), 0)
            inputs, part = world.attention.prepare(plan, world.rows), slice(start, start + n)
            parts.append([world.run(layer, plan, q[part], k[part], v[part], inputs) for layer in (0, 1)])
            world.rows.num_computed[0] += n
            start += n
        outs.append([torch.cat(layer) for layer in zip(*parts, strict=True)])
    for in_chunks, at_once in zip(*outs, strict=True):
        torch.testing.assert_close(in_chunks, at_once, atol=1e-5, rtol=1e-5)


def test_a_prefix_is_read_from_pages_of_another_sequence(backend: tuple[Backend, int]) -> None:
    P = backend[1]
    world = AttentionWorld(*backend, window=3 * P)
    world.step((0, 2 * P + 1))
    world.share(1, donor=0, num_pages=2)
    world.share(2, donor=0, num_pages=1)
    world.step((0, 1), (1, 1), (2, P + 1), num_decodes=1)
    world.step((0, 1), (1, 1), (2, 1), num_decodes=3)


@pytest.mark.parametrize("padding", [0, 4])
def test_a_step_of_nothing_gives_padding(backend: tuple[Backend, int], padding: int) -> None:
    world = AttentionWorld(*backend, window=4)
    nothing = world._plan(((0, 1),), 0).without({0})
    q, k, v = (world.draw(padding, heads) for heads in (4, 2, 2))
    out = world.attention.attend(GLOBAL, q, k, v, world.attention.prepare(nothing, world.rows))
    assert out.shape == (padding, 4, 16)
    assert not out.any()
