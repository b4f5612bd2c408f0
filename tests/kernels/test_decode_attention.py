"""The decode kernels in Triton's interpreter against the fp64 definition, and themselves bit for bit."""

from typing import Any

import pytest
import torch
from attention_case import E4M3, AttentionCase
from torch import Tensor

from cabochon.kernels.decode_attention import (
    DecodeConfig,
    DecodeWorkspace,
    decode_attention,
    decode_workspace,
    num_splits,
)

SMALL = DecodeConfig(split_tokens=32, block_n=16, programs=8, num_warps=4, num_stages=2)
LENGTHS = [1, 4, 31, 32, 33, 69]


def decodes(lengths: list[int], **options: Any) -> AttentionCase:
    return AttentionCase([(length, 1) for length in lengths], **options)


def run(case: AttentionCase, config: DecodeConfig | None = SMALL, **changed: Any) -> Tensor:
    tensors = {
        "q": case.q, "k_pages": case.k_nan, "v_pages": case.v_nan, "page_table": case.page_table,
        "seq_lens": case.seq_lens, **case.scales, **changed,
    }  # fmt: skip
    return decode_attention(**tensors, **case.softmax, config=config)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 1, 3, 16, 31, 32, 33, 1000])
def test_equals_the_definition_on_ragged_lengths(softcap: float | None, window: int | None) -> None:
    case = decodes(LENGTHS, softcap=softcap, window=window)
    case.assert_within_budget(run(case))


def test_what_is_hidden_weighs_nothing_under_a_small_cap() -> None:
    """Were the mask before the cap, hidden keys would weigh exp(-cap), which a cap of 50 conceals."""
    case = decodes(LENGTHS, softcap=1.0, window=9)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_definition_in_half_precision(softcap: float | None, dtype: torch.dtype) -> None:
    case = decodes(LENGTHS, softcap=softcap, window=40, dtype=dtype)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_e4m3_pages_are_read_with_a_scale_per_token_and_head(
    softcap: float | None, dtype: torch.dtype
) -> None:
    case = decodes(LENGTHS, softcap=softcap, window=40, dtype=dtype, kv_dtype=E4M3)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 1), (6, 2), (17, 1)])
def test_query_heads_share_their_kv_head(heads: tuple[int, int]) -> None:
    case = decodes([5, 50], window=40, heads=heads)
    case.assert_within_budget(run(case))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_tiles_equal_the_definition(dim: int, dtype: torch.dtype) -> None:
    case = decodes([300, 16, 255], window=290, dim=dim, dtype=dtype, page_tokens=16, gain=1.0)
    case.assert_within_budget(run(case, config=None))


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_context_of_8192_keys_under_a_window_of_4096(softcap: float | None) -> None:
    config = DecodeConfig(split_tokens=256, block_n=256, programs=1, num_warps=4, num_stages=1)
    case = decodes(
        [8192], softcap=softcap, window=4096, dim=64, dtype=torch.bfloat16, page_tokens=16, gain=1.0
    )
    case.assert_within_budget(run(case, config))


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_the_window_holds_w_keys_and_the_query_is_one_of_them(softcap: float | None) -> None:
    """Equal weights, and V counts the key: the mean over k in (q - W, q] is q - (W - 1) / 2."""
    case = decodes([70], softcap=softcap, heads=(1, 1))
    case.q.zero_()
    for key in range(70):
        case.v_nan[case.page_table[0, key // 4], key % 4] = key
    for window in (1, 15, 16, 17, 31, 32, 33, 69, 70, 71):
        case.window = window
        torch.testing.assert_close(run(case)[0, 0, 0], torch.tensor(69 - (min(window, 70) - 1) / 2))


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_row_without_keys_is_zero(softcap: float | None) -> None:
    """A graph captured for more rows than are running pads with them; their page tables are null."""
    case = decodes([5, 0, 40], softcap=softcap)
    out = run(case)
    assert (out[1] == 0).all()
    kept = [0, 2]
    alone = run(case, q=case.q[kept], page_table=case.page_table[kept], seq_lens=case.seq_lens[kept])
    assert torch.equal(out[kept], alone)


def test_no_sequences_give_nothing() -> None:
    assert run(decodes([])).shape == (0, 2, 16)


def test_strided_queries_and_outputs_are_read_and_written_in_place() -> None:
    case = decodes(LENGTHS, window=20)
    fused = torch.full((len(case.q), 4, 16), torch.nan)
    fused[:, :2] = case.q
    whole = torch.full((len(case.q), 3, 16), 7.0)
    out = run(case, q=fused[:, :2], out=whole[:, :2])
    assert out.data_ptr() == whole.data_ptr()
    assert torch.equal(whole[:, :2], run(case))
    assert (whole[:, 2:] == 7).all()


def poisoned(S: int, splits: int) -> DecodeWorkspace:
    workspace = decode_workspace(S, 2, 16, splits, torch.device("cpu"))
    for part in workspace:
        part.fill_(torch.nan)
    return workspace


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 40])
def test_a_sequence_has_the_same_bits_alone_and_among_others(
    softcap: float | None, window: int | None
) -> None:
    """Nor do they depend on the length of the table, the workspace or how programs share the splits."""
    case = decodes([1, 33, 69, 130], softcap=softcap, window=window, dtype=torch.bfloat16)
    together = run(case)
    for i in range(4):
        one = slice(i, i + 1)
        pages = -(-int(case.seq_lens[i]) // 4)
        alone = run(
            case,
            q=case.q[one],
            page_table=case.page_table[one, :pages],
            seq_lens=case.seq_lens[one],
            workspace=poisoned(3, 7),
        )
        assert torch.equal(alone, together[one])
    for programs in (1, 12, 1000):
        config = DecodeConfig(split_tokens=32, block_n=16, programs=programs, num_warps=4, num_stages=2)
        assert torch.equal(run(case, config), together)


def test_a_maximum_in_a_late_split_rescales_the_earlier_ones() -> None:
    """Without a softcap: one key far above all others takes all the weight, wherever it is."""
    for key in (0, 31, 32, 40, 69):
        case = decodes([70], softcap=None, heads=(1, 1))
        case.k_nan[case.page_table[0, key // 4], key % 4] = case.q[0] * 100
        torch.testing.assert_close(run(case)[0], case.v_nan[case.page_table[0, key // 4], key % 4])


def test_pages_past_two_billion_elements_are_found() -> None:
    """Memory of which only the used pages are ever touched."""
    case = decodes([33, 69], dtype=torch.bfloat16, kv_dtype=E4M3, dim=256, page_tokens=16)
    first = 2**31 // case.k_nan[0].numel()
    far = {}
    for name, pages in (("k_pages", case.k_nan), ("v_pages", case.v_nan)):
        far[name] = torch.empty((first + len(pages), *pages.shape[1:]), dtype=E4M3)
        far[name].view(torch.uint8)[first:] = pages.view(torch.uint8)
    for name, scales in case.scales.items():
        far[name] = torch.empty((first + len(scales), *scales.shape[1:]))
        far[name][first:] = scales
    assert torch.equal(run(case, page_table=case.page_table + first, **far), run(case))


def test_splits_are_counted_from_the_windows_start() -> None:
    assert num_splits(8192, None, 256) == 32
    assert num_splits(8192, 4096, 256) == 16
    assert num_splits(100, 4096, 256) == 1


def test_a_workspace_that_is_too_small_is_refused() -> None:
    case = decodes([69])
    with pytest.raises(ValueError, match=r"workspace must hold \[S, Hq, splits, D\] = \[1, 2, 3, 16\]"):
        run(case, workspace=poisoned(1, 2))


def test_one_query_per_sequence_is_asked_for() -> None:
    case = decodes([5, 6])
    with pytest.raises(ValueError, match="q must have one row per sequence, S = 2, got 1"):
        run(case, q=case.q[:1])
