"""The prefill kernel in Triton's interpreter against the fp64 definition, and itself bit for bit."""

import pytest
import torch
from attention_case import E4M3, AttentionCase
from torch import Tensor

from cabochon.kernels.prefill_attention import PrefillConfig, prefill_attention

SMALL = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, parts=1, use_ptx_tanh=True)
RAGGED = [(13, 13), (1, 1), (9, 0), (33, 7), (37, 1)]  # (keys, queries)


def run(case: AttentionCase, config: PrefillConfig | None = SMALL, **changed: Tensor) -> Tensor:
    tensors = {
        "q": case.q, "k_pages": case.k_nan, "v_pages": case.v_nan, "page_table": case.page_table,
        "cu_seqlens_q": case.cu_seqlens_q, "seq_lens": case.seq_lens, **case.scales, **changed,
    }  # fmt: skip
    return prefill_attention(**tensors, **case.softmax, config=config)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 1, 3, 16, 17, 1000])
def test_equals_the_definition_on_a_ragged_batch(softcap: float | None, window: int | None) -> None:
    case = AttentionCase(RAGGED, softcap=softcap, window=window)
    case.assert_within_budget(run(case))


def test_what_is_hidden_weighs_nothing_under_a_small_cap() -> None:
    """Were the mask before the cap, hidden keys would weigh exp(-cap), which a cap of 50 conceals."""
    case = AttentionCase(RAGGED, softcap=1.0, window=9)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 9])
def test_equals_the_definition_in_half_precision(
    softcap: float | None, dtype: torch.dtype, window: int | None
) -> None:
    case = AttentionCase(RAGGED, softcap=softcap, window=window, dtype=dtype)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_e4m3_pages_are_read_with_a_scale_per_token_and_head(
    softcap: float | None, dtype: torch.dtype
) -> None:
    case = AttentionCase(RAGGED, softcap=softcap, window=9, dtype=dtype, kv_dtype=E4M3)
    case.assert_within_budget(run(case))


def test_every_e4m3_byte_is_read_the_same_on_gpus_without_the_conversion() -> None:
    """There pages come as bytes. One query, whose keys' V rows hold all 254 numbers; equal weights."""
    case = AttentionCase([(254, 1)], softcap=None, heads=(1, 1), kv_dtype=E4M3)
    numbers = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    for i, byte in enumerate(numbers):
        case.v_nan.view(torch.uint8)[case.page_table[0, i // 4], i % 4] = byte
    as_bytes = {"k_pages": case.k_nan.view(torch.uint8), "v_pages": case.v_nan.view(torch.uint8)}
    expected = run(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cabochon.kernels.prefill_attention.check_pages", lambda *_: None)
        assert torch.equal(run(case, **as_bytes), expected)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 1), (6, 2)])
def test_query_heads_share_their_kv_head(heads: tuple[int, int]) -> None:
    case = AttentionCase([(13, 13), (21, 9)], window=7, heads=heads)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_tiles_equal_the_definition(dim: int, dtype: torch.dtype) -> None:
    case = AttentionCase(
        [(70, 70), (1, 1), (129, 3)], window=65, dim=dim, dtype=dtype, page_tokens=16, gain=1.0
    )
    case.assert_within_budget(run(case, config=None))


@pytest.mark.parametrize("parts", [2, 4])
def test_v_in_parts_gives_the_same_bits(parts: int) -> None:
    case = AttentionCase(RAGGED, dim=64, window=9)
    config = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, parts=parts, use_ptx_tanh=True)
    assert torch.equal(run(case, config), run(case))


@pytest.mark.parametrize("queries", [1, 7, 8, 9, 16, 17])
def test_lengths_around_a_tile_and_a_page(queries: int) -> None:
    case = AttentionCase([(queries, queries), (queries + 4, queries), (queries + 15, queries)], window=None)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_the_window_holds_w_keys_and_the_query_is_one_of_them(softcap: float | None) -> None:
    """Equal weights, and V counts the key: the mean over k in (q - W, q] is q - (W - 1) / 2."""
    case = AttentionCase([(40, 40)], softcap=softcap, heads=(1, 1))
    case.q.zero_()
    for key in range(40):
        case.v_nan[case.page_table[0, key // 4], key % 4] = key
    for window in (15, 16, 17, 39, 40, 41):
        case.window = window
        expected = [
            sum(seen) / len(seen) for q in range(40) if (seen := range(max(q - window + 1, 0), q + 1))
        ]
        torch.testing.assert_close(run(case)[:, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("gain", [1e6, 1e30])
def test_a_query_that_saturates_every_score_stays_finite(gain: float) -> None:
    case = AttentionCase(RAGGED, dtype=torch.bfloat16)
    case.q *= gain
    case.assert_within_budget(run(case))


def test_no_sequences_and_no_queries_give_nothing() -> None:
    assert run(AttentionCase([])).shape == (0, 2, 16)
    assert run(AttentionCase([(5, 0), (0, 0)])).shape == (0, 2, 16)


def test_strided_queries_and_outputs_are_read_and_written_in_place() -> None:
    case = AttentionCase(RAGGED, window=9)
    expected = run(case)
    fused = torch.full((len(case.q), 4, 16), torch.nan)  # as the fused projection leaves q, k and v
    fused[:, :2] = case.q
    whole = torch.full((len(case.q), 3, 16), 7.0)
    out = run(case, q=fused[:, :2], out=whole[:, :2])
    assert out.data_ptr() == whole.data_ptr()
    assert torch.equal(whole[:, :2], expected)
    assert (whole[:, 2:] == 7).all()


def test_tokens_before_the_first_sequence_are_left_alone() -> None:
    """Decodes stand first in a step: their rows are the other kernel's."""
    case = AttentionCase(RAGGED)
    q = torch.cat([torch.full((3, 2, 16), torch.nan), case.q])
    out = run(case, q=q, cu_seqlens_q=case.cu_seqlens_q + 3, out=torch.full_like(q, 7.0))
    assert (out[:3] == 7).all()
    assert torch.equal(out[3:], run(case))


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 9])
def test_a_sequence_has_the_same_bits_alone_and_among_others(
    softcap: float | None, window: int | None
) -> None:
    case = AttentionCase(RAGGED, softcap=softcap, window=window, dtype=torch.bfloat16)
    together, bounds = run(case), case.cu_seqlens_q.tolist()
    for i in (0, 1, 3, 4):
        rows = slice(bounds[i], bounds[i + 1])
        alone = run(
            case,
            q=case.q[rows],
            page_table=case.page_table[i : i + 1],
            seq_lens=case.seq_lens[i : i + 1],
            cu_seqlens_q=torch.tensor([0, bounds[i + 1] - bounds[i]], dtype=torch.int32),
        )
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 9, 20])
def test_a_prompt_has_the_same_bits_whole_and_in_chunks(softcap: float | None, window: int | None) -> None:
    whole = AttentionCase([(45, 45)], softcap=softcap, window=window, dtype=torch.bfloat16)
    expected = run(whole)
    for start, end in ((0, 5), (5, 6), (6, 30), (30, 45), (44, 45)):
        part = run(
            whole,
            q=whole.q[start:end],
            seq_lens=torch.tensor([end], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32),
        )
        assert torch.equal(part, expected[start:end])
