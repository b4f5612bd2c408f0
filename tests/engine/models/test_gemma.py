"""The forward pass against transformers' eager classes in fp32: logits within 1e-4 on every path."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from forward import Forward
from random_gemma import model_config, oracle_logits, random_gemma2, random_gemma3

from cabochon.kernels.error_budget import assert_within_budget

Make = Callable[..., torch.nn.Module]
ATOL = 1e-4

SHAPES = {
    "gemma2": (random_gemma2, {}),
    "gemma2-odd-sizes": (random_gemma2, {"vocab_size": 97, "hidden_size": 56, "intermediate_size": 72}),
    "gemma2-window-of-one-page": (random_gemma2, {"sliding_window": 4}),
    "gemma2-window-of-one": (random_gemma2, {"sliding_window": 1}),
    "gemma2-multi-head": (random_gemma2, {"num_key_value_heads": 4}),
    "gemma2-multi-query": (random_gemma2, {"num_key_value_heads": 1, "num_attention_heads": 8}),
    "gemma2-27b-like": (
        random_gemma2,
        {"hidden_size": 144, "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 18},
    ),
    "gemma3": (random_gemma3, {}),
    "gemma3-270m-like": (random_gemma3, {"num_key_value_heads": 1}),
}


def forward_for(hf: torch.nn.Module, **kwargs: object) -> Forward:
    return Forward(model_config(hf.config), dict(hf.state_dict()), **kwargs)


def capped(logits: torch.Tensor, hf: torch.nn.Module) -> torch.Tensor:
    return 30 * (logits / 30).tanh() if hf.config.model_type == "gemma2" else logits


def ids_of(length: int, vocab_size: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab_size, length).tolist()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 9, 8, 1, 1, 14], [16, 16, 8]], ids=str)
def test_logits_equal_transformers_on_every_chunking(name: str, chunks: list[int]) -> None:
    make, overrides = SHAPES[name]
    hf = make(**overrides)
    ids = ids_of(40, hf.config.vocab_size)
    ours = forward_for(hf)
    row = ours.add(ids)
    logits = torch.cat([ours.step([(row, n)])[0] for n in chunks])
    torch.testing.assert_close(capped(logits, hf), oracle_logits(hf, ids), atol=ATOL, rtol=0)


def test_scores_of_the_random_gemma2_pass_the_softcap() -> None:
    hf = random_gemma2()
    ids = torch.tensor([ids_of(40, hf.config.vocab_size)])
    highest = 0.0
    with torch.inference_mode():
        states = hf.model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer, state in zip(hf.model.layers, states, strict=False):
            x = layer.input_layernorm(state)
            q = layer.self_attn.q_proj(x).view(1, 40, 4, 16).transpose(1, 2)
            k = layer.self_attn.k_proj(x).view(1, 40, 2, 16).transpose(1, 2).repeat_interleave(2, 1)
            highest = max(highest, (q @ k.mT * hf.config.query_pre_attn_scalar**-0.5).abs().max().item())
    assert highest > 75


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
@pytest.mark.parametrize("window", [255, 256, 257, 300])
def test_logits_equal_transformers_across_key_tiles(make: Make, window: int) -> None:
    # At a gain of 24 transformers' own fp32 is 1.4e-4 from its fp64 over 700 keys, and so are we.
    hf = make(qk_gain=2.0, sliding_window=window, max_position_embeddings=1024)
    ids = ids_of(700, hf.config.vocab_size)
    ours = forward_for(hf, max_len=704, page_tokens=16, max_seqs=1)
    row = ours.add(ids)
    logits = torch.cat([ours.step([(row, n)])[0] for n in (253, 1, 1, 1, 1, 130, 313)])
    torch.testing.assert_close(capped(logits, hf), oracle_logits(hf, ids), atol=ATOL, rtol=0)


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
@pytest.mark.parametrize("page_tokens", [1, 2, 16, 512])
def test_logits_equal_transformers_on_every_page_size(make: Make, page_tokens: int) -> None:
    hf = make()
    ids = ids_of(37, hf.config.vocab_size)
    ours = forward_for(hf, page_tokens=page_tokens, max_seqs=2)
    row = ours.add(ids)
    logits = torch.cat([ours.step([(row, n)])[0] for n in (5, 30, 1, 1)])
    torch.testing.assert_close(capped(logits, hf), oracle_logits(hf, ids), atol=ATOL, rtol=0)


def test_a_swapped_layer_parity_is_noticed() -> None:
    hf = random_gemma2()
    config = model_config(hf.config)
    swapped = dataclasses.replace(config, is_sliding=tuple(not s for s in config.is_sliding))
    ids = ids_of(40, hf.config.vocab_size)
    ours = Forward(swapped, dict(hf.state_dict()))
    logits = ours.step([(ours.add(ids), 40)])[0]
    assert (capped(logits, hf) - oracle_logits(hf, ids)).abs().max() > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"attention_softcap": None},
        {"attention_scale": 16**-0.5},
        {"window": 9},
        {"window": 7},
        {"rope_theta_sliding": 10_100.0},
        {"norm_eps": 1e-3},
    ],
    ids=str,
)
def test_each_wrong_constant_is_noticed(change: dict[str, object]) -> None:
    hf = random_gemma2()
    ids = ids_of(40, hf.config.vocab_size)
    ours = Forward(dataclasses.replace(model_config(hf.config), **change), dict(hf.state_dict()))
    logits = ours.step([(ours.add(ids), 40)])[0]
    assert (capped(logits, hf) - oracle_logits(hf, ids)).abs().max() > 2 * ATOL


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
def test_fp32_logits_are_bitwise_the_same_alone_among_others_and_on_any_chunking(make: Make) -> None:
    hf = make(sliding_window=260, max_position_embeddings=1024)
    ids = ids_of(530, hf.config.vocab_size)
    alone = forward_for(hf, max_len=560, page_tokens=16, max_seqs=1)
    expected = alone.step([(alone.add(ids), len(ids))])[0]

    ours = forward_for(hf, max_len=560, page_tokens=16, max_seqs=8, seed=3)
    row = ours.add(ids)
    others = [ours.add(ids_of(n, hf.config.vocab_size, seed=n)) for n in (3, 70, 259, 300, 511, 520, 530)]
    rng = np.random.default_rng(5)
    got, left = [], len(ids)
    while left:
        n = min(left, int(rng.choice([1, 1, 1, 2, 5, 31, 64, 129])))
        room = {o: int(ours.rows.num_tokens[o] - ours.rows.num_computed[o]) for o in others}
        work = [(row, n)] + [(o, int(rng.integers(1, min(r, 40) + 1))) for o, r in room.items() if r]
        rng.shuffle(work)
        work = [(int(r), int(m)) for r, m in work]
        got.append(ours.step(work)[[r for r, _ in work].index(row)])
        left -= n
    assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
def test_bf16_logits_are_bitwise_the_same_whoever_shares_the_batch(make: Make) -> None:
    hf = make(sliding_window=260, max_position_embeddings=1024)
    ids = ids_of(300, hf.config.vocab_size)
    chunks = [200, 70, *[1] * 30]
    alone = forward_for(hf, dtype=torch.bfloat16, max_len=560, page_tokens=16, max_seqs=1)
    row = alone.add(ids)
    expected = [alone.step([(row, n)])[0] for n in chunks]

    ours = forward_for(hf, dtype=torch.bfloat16, max_len=560, page_tokens=16, max_seqs=8)
    others = [ours.add(ids_of(n, hf.config.vocab_size, seed=n)) for n in (40, 60, 100, 290)]
    row = ours.add(ids)
    for chunk, wanted in zip(chunks, expected, strict=True):
        room = {o: int(ours.rows.num_tokens[o] - ours.rows.num_computed[o]) for o in others}
        work = [(o, min(r, 3)) for o, r in room.items() if r] + [(row, chunk)]
        assert torch.equal(ours.step(work)[-1], wanted)


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
def test_bf16_logits_stay_within_the_error_budget(make: Make) -> None:
    hf = make(qk_gain=1.0)
    ids = ids_of(40, hf.config.vocab_size)
    truth = oracle_logits(hf.bfloat16().double(), ids)  # the rounded weights, computed in fp64
    low = oracle_logits(hf.bfloat16(), ids)
    ours = forward_for(hf, dtype=torch.bfloat16)
    logits = ours.step([(ours.add(ids), 40)])[0]
    assert_within_budget(capped(logits.float(), hf).bfloat16(), low, truth)


def test_the_embedding_scale_is_rounded_to_the_weights_dtype() -> None:
    assert torch.tensor(3584**0.5, dtype=torch.bfloat16).item() == 59.75
    assert torch.tensor(4608**0.5, dtype=torch.bfloat16).item() == 68.0
    hf = random_gemma2(hidden_size=56)  # √56 = 7.483; 7.469 in bf16
    ours = forward_for(hf, dtype=torch.bfloat16)
    assert ours.model._embedding_scale.item() == torch.tensor(56**0.5).bfloat16().item()


def test_a_small_norm_weight_survives_bf16() -> None:
    hf = random_gemma2()
    weights = dict(hf.state_dict()) | {"model.norm.weight": torch.full((64,), 2**-10)}
    ours = Forward(model_config(hf.config), weights, dtype=torch.bfloat16)
    assert ours.model._final_norm[0].item() == 1 + 2**-10
