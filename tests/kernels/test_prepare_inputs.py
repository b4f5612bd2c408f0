"""Inputs of decodes against the CPU engine's own preparation, and rows that grow on the device."""

import numpy as np
import pytest
import torch

from cabochon.engine.attention import TorchAttention
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows
from cabochon.kernels.prepare_inputs import (
    BLOCK_M,
    BLOCK_S,
    DecodeInputs,
    append_tokens,
    decode_inputs,
    prepare_decodes,
    prepare_decodes_reference,
)

P = 4
GROUPS = 2
UNWRITTEN = -77
MODEL = ModelConfig(
    architecture="Gemma2ForCausalLM", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, mlp_size=16, norm_eps=1e-6, attention_scale=1.0, attention_softcap=50.0,
    final_softcap=30.0, window=8, is_sliding=(True, False), rope_theta_sliding=1e4, rope_theta_global=1e4,
    rope_factor_global=1.0, has_qk_norm=False, max_model_len=4096, eos_token_ids=(1,), bos_token_id=2,
)  # fmt: skip


def some_rows(lens: list[int], seed: int = 0, max_model_len: int = 4096) -> Rows:
    """Rows of random tokens with a random page behind every position."""
    rng = np.random.default_rng(seed)
    rows = Rows(max_seqs=len(lens) + 2, max_model_len=max_model_len, num_groups=GROUPS, page_tokens=P)
    rows.token_ids[:] = rng.integers(1, 64, rows.token_ids.shape)
    for row, num_tokens in enumerate(lens):
        rows.num_tokens[row] = num_tokens
        held = -(-num_tokens // P)
        rows.page_tables[:, row, :held] = rng.integers(1, 2**31 // P - 1, (GROUPS, held))
    return rows


def on_device(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(rows.token_ids.copy()),
        torch.from_numpy(rows.num_tokens.copy()),
        torch.from_numpy(rows.page_tables.copy()),
    )


def prepared(rows: Rows, row_ids: list[int]) -> DecodeInputs:
    out = decode_inputs(len(row_ids), GROUPS, rows.page_tables.shape[2], torch.device("cpu"))
    for buffer in out:
        buffer.fill_(UNWRITTEN)
    prepare_decodes(torch.tensor(row_ids, dtype=torch.int32), *on_device(rows), P, out=out)
    return out


def test_matches_the_cpu_engine() -> None:
    rows = some_rows([1, P - 1, P, P + 1, 2 * P, 37, BLOCK_M * P, BLOCK_M * P + 1, 4096])
    row_ids = [7, 2, 0, 8, 5, 1, 3, 6, 4]
    out = prepared(rows, row_ids)
    batch = np.array(row_ids, np.int32)
    plan = Plan(
        batch, rows.num_tokens[batch] - 1, np.ones_like(batch), np.ones(len(batch), np.bool_), len(batch)
    )
    pages = KVPages(MODEL, kv_layout(MODEL, P, 4), 1, torch.float32, torch.device("cpu"))
    expected = TorchAttention(MODEL, pages).prepare(plan, rows)
    assert torch.equal(out.positions, expected.positions)
    assert torch.equal(out.slots, torch.stack(expected.slots))
    assert out.token_ids.tolist() == rows.token_ids[batch, rows.num_tokens[batch] - 1].tolist()
    assert out.seq_lens.tolist() == rows.num_tokens[batch].tolist()
    for seq, row in enumerate(row_ids):
        held = -(-int(rows.num_tokens[row]) // P)
        assert (out.page_tables[:, seq, :held].numpy() == rows.page_tables[:, row, :held]).all()
        assert (out.page_tables[:, seq, held:] == UNWRITTEN).all()


def test_matches_the_definition_with_padding() -> None:
    rows = some_rows([5, 9, 4])
    out = prepared(rows, [-1, 2, 0, -1, -1, 1])
    row_ids = torch.tensor([-1, 2, 0, -1, -1, 1], dtype=torch.int32)
    expected = prepare_decodes_reference(row_ids, *on_device(rows), P)
    for mine, theirs in zip(out[:4], expected[:4], strict=True):
        assert torch.equal(mine, theirs)


def test_padding_reads_no_row_and_writes_no_slot() -> None:
    out = prepared(some_rows([5]), [-1, -1])
    assert out.token_ids.tolist() == out.positions.tolist() == out.seq_lens.tolist() == [0, 0]
    assert (out.slots == -1).all()
    assert (out.page_tables == UNWRITTEN).all()


def test_a_token_without_a_page_is_not_written_to_the_null_page() -> None:
    rows = some_rows([6])
    rows.page_tables[0, 0, 1] = 0
    out = prepared(rows, [0])
    assert out.slots[0].item() == -1
    assert out.slots[1].item() > 0


def test_slots_pass_2_to_the_31() -> None:
    rows = some_rows([6])
    rows.page_tables[:, 0, 1] = 2**31 - 1
    assert prepared(rows, [0]).slots.tolist() == [[(2**31 - 1) * P + 1]] * 2


def test_no_sequences_is_no_work() -> None:
    assert prepared(some_rows([3]), []).positions.shape == (0,)


def test_buffers_of_another_size_are_told() -> None:
    out = decode_inputs(3, GROUPS, 8, torch.device("cpu"))
    with pytest.raises(ValueError, match="buffers must be of 2 groups, 1 sequences and 1024 pages"):
        prepare_decodes(torch.zeros(1, dtype=torch.int32), *on_device(some_rows([3])), P, out=out)


def test_sampled_tokens_enter_their_rows() -> None:
    token_ids, num_tokens, _ = on_device(some_rows([3, 1, 5, 2]))
    before = token_ids.clone()
    rows = torch.tensor([2, -1, 0, 3], dtype=torch.int32)
    append_tokens(rows, torch.tensor([40, 41, 42, -1], dtype=torch.int32), token_ids, num_tokens)
    assert num_tokens.tolist()[:4] == [4, 1, 6, 2]
    before[2, 5], before[0, 3] = 40, 42
    assert torch.equal(token_ids, before)


def test_a_full_row_takes_no_token() -> None:
    token_ids, num_tokens, _ = on_device(some_rows([8, 7], max_model_len=8))
    before = token_ids.clone()
    rows, sampled = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([40, 41], dtype=torch.int32)
    append_tokens(rows, sampled, token_ids, num_tokens)
    assert num_tokens.tolist()[:2] == [8, 8]
    before[1, 7] = 41
    assert torch.equal(token_ids, before)


@pytest.mark.parametrize("S", [1, BLOCK_S - 1, BLOCK_S, BLOCK_S + 1])
def test_every_row_of_a_batch_gets_its_own_token(S: int) -> None:
    token_ids, num_tokens = torch.zeros(S, 4, dtype=torch.int32), torch.arange(S, dtype=torch.int32) % 4
    rows = torch.arange(S, dtype=torch.int32).flip(0)
    append_tokens(rows, rows + 1000, token_ids, num_tokens)
    assert token_ids[torch.arange(S), torch.arange(S) % 4].tolist() == (torch.arange(S) + 1000).tolist()
    assert num_tokens.tolist() == (torch.arange(S) % 4 + 1).tolist()


def test_a_step_appends_what_the_next_one_reads() -> None:
    token_ids, num_tokens, page_tables = on_device(some_rows([7, 12]))
    page_tables[page_tables == 0] = 9
    rows = torch.tensor([1, 0], dtype=torch.int32)
    out = decode_inputs(2, GROUPS, page_tables.shape[2], torch.device("cpu"))
    append_tokens(rows, torch.tensor([50, 51], dtype=torch.int32), token_ids, num_tokens)
    prepare_decodes(rows, token_ids, num_tokens, page_tables, P, out=out)
    assert out.token_ids.tolist() == [50, 51]
    assert out.positions.tolist() == [12, 7]
    assert out.slots[:, 0].tolist() == [9 * P] * 2
