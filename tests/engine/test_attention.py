"""What a step tells the attention: positions and slots by hand, each layer's own window and pages."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_gemma import BASE, model_config
from torch import Tensor
from transformers import Gemma2Config

from cabochon.engine.attention import TorchAttention
from cabochon.engine.kv_layout import kv_layout
from cabochon.engine.kv_pages import KVPages
from cabochon.engine.plan import Plan
from cabochon.engine.rows import Rows

P = 4
CONFIG = model_config(
    Gemma2Config(**BASE)
)  # W = 8, Hq = 4, Hkv = 2, D = 16; layer 0 slides, layer 1 does not
SLIDING, GLOBAL = 0, 1  # layer groups, and layers of them


def attention_with(num_pages: int = 20, max_seqs: int = 4, max_len: int = 40) -> tuple[TorchAttention, Rows]:
    pages = KVPages(CONFIG, kv_layout(CONFIG, P, 4), num_pages, torch.float32, torch.device("cpu"))
    rows = Rows(max_seqs=max_seqs, max_model_len=max_len, num_groups=2, page_tokens=P)
    return TorchAttention(CONFIG, pages), rows


def plan_of(*work: tuple[int, int, int], num_decodes: int = 0) -> Plan:
    """work: (row, start, len)."""
    rows, starts, lens = (np.array(column, np.int32) for column in zip(*work, strict=True))
    return Plan(rows, starts, lens, np.ones(len(rows), np.bool_), num_decodes)


def mixed(rows: Rows) -> Plan:
    """A decode at 9 in row 2, a chunk 3..6 in row 0, a whole prompt of 2 in row 3."""
    rows.page_tables[SLIDING, 2, :3] = [0, 11, 12]
    rows.page_tables[SLIDING, 0, :2] = [13, 14]
    rows.page_tables[SLIDING, 3, :1] = [15]
    rows.page_tables[GLOBAL, 2, :3] = [1, 2, 3]
    rows.page_tables[GLOBAL, 0, :2] = [4, 5]
    rows.page_tables[GLOBAL, 3, :1] = [6]
    return plan_of((2, 9, 1), (0, 3, 4), (3, 0, 2), num_decodes=1)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softcapped(q: Tensor, k: Tensor, v: Tensor, visible: Sequence[int], head: int) -> Tensor:
    """One query of one head over the keys it sees, in fp64."""
    kv_head = head // 2
    keys = k[list(visible), kv_head].double()
    scores = keys @ q[head].double() * CONFIG.attention_scale
    weights = F.softmax(50 * torch.tanh(scores / 50), dim=0)
    return weights @ v[list(visible), kv_head].double()


def test_positions_and_slots_of_a_mixed_plan() -> None:
    attention, rows = attention_with()
    inputs = attention.prepare(mixed(rows), rows)
    assert inputs.positions.tolist() == [9, 3, 4, 5, 6, 0, 1]
    assert inputs.slots[SLIDING].tolist() == [12 * P + 1, 13 * P + 3, 56, 57, 58, 60, 61]
    assert inputs.slots[GLOBAL].tolist() == [3 * P + 1, 4 * P + 3, 20, 21, 22, 24, 25]
    assert {slots.dtype for slots in (*inputs.slots, inputs.positions)} == {torch.int64}


def test_slots_pass_two_to_the_31() -> None:
    attention, rows = attention_with()
    rows.page_tables[:, 1, 0] = 2**30
    inputs = attention.prepare(plan_of((1, 1, 1), num_decodes=1), rows)
    assert [slots.tolist() for slots in inputs.slots] == [[2**32 + 1]] * 2


@pytest.mark.parametrize("group", [SLIDING, GLOBAL])
def test_a_token_without_a_page_is_noticed(group: int) -> None:
    attention, rows = attention_with()
    plan = mixed(rows)
    rows.page_tables[group, 0, 1] = 0
    with pytest.raises(AssertionError, match="a token has no page"):
        attention.prepare(plan, rows)


def test_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    attention, rows = attention_with()
    inputs = attention.prepare(mixed(rows), rows)
    k, v = random(8, 2, 16, seed=1), random(8, 2, 16, seed=2)  # the last row is padding
    attention.attend(GLOBAL, random(8, 4, 16, seed=0), k, v, inputs)
    slots = inputs.slots[GLOBAL]
    for pages, given in ((attention._pages.k, k), (attention._pages.v, v)):
        flat = pages[0].view(-1, 2, 16)
        assert torch.equal(flat[slots], given[:7])
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[slots] = False
        assert not flat[untouched].any()
        assert not pages[1].any(), "another place of the group"


def test_rows_of_padding_get_zeros() -> None:
    attention, rows = attention_with()
    inputs = attention.prepare(mixed(rows), rows)
    q, k, v = random(8, 4, 16, seed=0), random(8, 2, 16, seed=1), random(8, 2, 16, seed=2)
    out = attention.attend(GLOBAL, q, k, v, inputs)
    assert out.shape == (8, 4, 16)
    assert out[:7].abs().amin() > 0
    assert not out[7].any()


def two_chunks_then_a_decode(attention: TorchAttention, rows: Rows, layer: int) -> tuple[Tensor, ...]:
    """13 tokens of one sequence in steps of 7, 5 and 1. Returns q, k, v, out: [13, H, D]."""
    q, k, v = random(13, 4, 16, seed=3) * 4, random(13, 2, 16, seed=4) * 4, random(13, 2, 16, seed=5)
    rows.page_tables[SLIDING, 1, :4] = [9, 3, 17, 4]
    rows.page_tables[GLOBAL, 1, :4] = [8, 2, 16, 5]
    parts = []
    for start, end in ((0, 7), (7, 12), (12, 13)):
        plan = plan_of((1, start, end - start), num_decodes=int(start == 12))
        inputs = attention.prepare(plan, rows)
        parts.append(attention.attend(layer, q[start:end], k[start:end], v[start:end], inputs))
    return q, k, v, torch.cat(parts)


@pytest.mark.parametrize(("layer", "window"), [(0, 8), (1, 100), (2, 8), (3, 100)])
def test_each_layer_sees_its_window_through_pages(layer: int, window: int) -> None:
    q, k, v, out = two_chunks_then_a_decode(*attention_with(), layer)
    for position in range(13):
        visible = range(max(0, position - window + 1), position + 1)
        for head in range(4):
            expected = softcapped(q[position], k, v, visible, head)
            torch.testing.assert_close(out[position, head].double(), expected, atol=1e-5, rtol=0)


def test_a_page_behind_the_window_may_be_gone() -> None:
    attention, rows = attention_with()
    two_chunks_then_a_decode(attention, rows, layer=0)
    q, k, v = random(1, 4, 16, seed=6), random(1, 2, 16, seed=7), random(1, 2, 16, seed=8)
    outs = []
    for _ in range(2):  # the query 13 sees 6..13: page 0 is of no use
        inputs = attention.prepare(plan_of((1, 13, 1), num_decodes=1), rows)
        outs.append(attention.attend(0, q, k, v, inputs))
        attention._pages.k[0][9] = attention._pages.v[0][9] = torch.nan
        rows.page_tables[SLIDING, 1, 0] = 0
    assert torch.equal(*outs)


def test_the_order_of_the_sequences_changes_nothing() -> None:
    attention, rows = attention_with()
    mixed(rows)
    work = [(0, 3, 4), (3, 0, 2), (2, 4, 3)]
    q, k, v = random(9, 4, 16, seed=0), random(9, 2, 16, seed=1), random(9, 2, 16, seed=2)
    shuffled = [work[2], work[1], work[0]]
    index = torch.tensor([6, 7, 8, 4, 5, 0, 1, 2, 3])  # the same tokens, the last sequence first
    first = attention.attend(1, q, k, v, attention.prepare(plan_of(*work), rows))
    second = attention.attend(1, q[index], k[index], v[index], attention.prepare(plan_of(*shuffled), rows))
    assert torch.equal(first[index], second)


def test_inputs_hold_slots_and_sections_of_every_group() -> None:
    attention, rows = attention_with()
    inputs = attention.prepare(mixed(rows), rows)
    for sections in inputs.sections:
        assert [(section.start, section.end) for section in sections] == [(0, 1), (1, 5), (5, 7)]
