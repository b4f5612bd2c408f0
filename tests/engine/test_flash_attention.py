"""The flash-attn backend on a stand-in of the library: its calls, and an engine's tokens beside torch's."""

import inspect
from pathlib import Path

import fake_flash_attn
import numpy as np
import pytest
import torch
from attention_world import AttentionWorld

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.engine.llm import LLM
from cabochon.engine.load import load_engine
from cabochon.engine.sampling_params import SamplingParams

P = 256
FAST = (-1, -1)  # without a window the library shares reads of K and V between query heads

# Parameters in order, with defaults, as flash_attn/flash_attn_interface.py of flash-attn 2.8.3 has them
RECORDED = {
    "flash_attn_varlen_func": (
        "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,"
        " causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,"
        " return_attn_probs=False, block_table=None)"
    ),
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,"
        " window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,"
        " return_softmax_lse=False)"
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_the_stand_in_has_the_librarys_signatures(name: str) -> None:
    signature = inspect.signature(getattr(fake_flash_attn, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == RECORDED[name]


@pytest.mark.parametrize("name", RECORDED)
def test_the_installed_library_has_the_recorded_signatures(name: str) -> None:
    library = pytest.importorskip(
        "flash_attn", reason="flash-attn is not installed: it needs a GPU's compiler"
    )
    signature = inspect.signature(getattr(library, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == RECORDED[name]


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "window", "visible"),
    [
        (2, 5, (-1, -1), ["11110", "11111"]),  # the matrices of the library's docstring
        (5, 2, (-1, -1), ["00", "00", "00", "10", "11"]),
        (3, 5, (1, 0), ["01100", "00110", "00011"]),
        (3, 5, (0, 0), ["00100", "00010", "00001"]),
        (3, 5, (1, -1), ["01100", "00110", "00011"]),
    ],
)
def test_the_stand_in_masks_as_the_library_documents(
    num_queries: int, num_keys: int, window: tuple[int, int], visible: list[str]
) -> None:
    """Equal weights and unit vectors as values: an output is its row of the mask over what it sees."""
    q = torch.zeros(num_queries, 1, 8, dtype=torch.float16)
    v = torch.zeros(1, P, 1, 8, dtype=torch.float16)
    v[0, :8, 0] = torch.eye(8)
    mask = torch.tensor([[float(sign) for sign in row] for row in visible])
    expected = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    lens, table = torch.tensor([num_keys], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    options = {"causal": True, "window_size": window, "block_table": table}
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (num_queries, num_keys))
    ragged = fake_flash_attn.flash_attn_varlen_func(
        q, v, v, cu_q, cu_k, num_queries, num_keys, **options
    )  # fmt: skip
    batched = fake_flash_attn.flash_attn_with_kvcache(q[None], v, v, cache_seqlens=lens, **options)[0]
    for out in (ragged, batched):
        torch.testing.assert_close(out[:, 0, :num_keys].float(), expected, atol=1e-3, rtol=0)


@pytest.fixture
def world(fake_flash: None) -> AttentionWorld:
    return AttentionWorld("flash-attn", P, window=P + 8, dtype=torch.bfloat16)


def test_decodes_never_enter_the_prefill_call(world: AttentionWorld) -> None:
    world.step((0, 3), (1, 5))
    assert dict(fake_flash_attn.calls) == {"varlen": 2}  # one in each of two layers
    world.step((0, 1), (2, 4), num_decodes=1)
    assert dict(fake_flash_attn.calls) == {"varlen": 4, "kvcache": 2}
    world.step((0, 1), (1, 1), (2, 1), num_decodes=3)
    assert dict(fake_flash_attn.calls) == {"varlen": 4, "kvcache": 4}


def test_a_call_has_a_window_only_where_it_hides_something(world: AttentionWorld) -> None:
    world.step((0, P + 8), (1, 10), (2, P + 9))
    for work, decodes, prefills in [
        (((1, 1), (3, P + 8)), FAST, FAST),
        (((0, 1), (3, 1)), (P + 7, 0), FAST),
        (((1, 1), (2, 3)), FAST, (P + 7, 0)),
    ]:
        plan = world._plan(work, num_decodes=1)
        inputs = world.attention.prepare(plan, world.rows)
        assert inputs.decodes.windows == [decodes, FAST]
        assert inputs.prefills.windows == [prefills, FAST]


def test_a_table_is_as_wide_as_its_own_sequences_need(world: AttentionWorld) -> None:
    """The library shares the width of the decodes' table out among their splits."""
    world.step((0, P - 1))
    inputs = world.attention.prepare(world._plan(((0, 1), (1, 3 * P + 1)), num_decodes=1), world.rows)
    assert [table.shape for table in inputs.decodes.page_tables] == [(1, 1)] * 2
    assert [table.shape for table in inputs.prefills.page_tables] == [(1, 4)] * 2
    assert inputs.prefills.cu_seqlens_q.tolist() == inputs.prefills.cu_seqlens_k.tolist() == [0, 3 * P + 1]
    assert (inputs.prefills.max_q, inputs.prefills.max_k) == (3 * P + 1, 3 * P + 1)


def refuse(world: AttentionWorld, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        world.step((0, 3))


@pytest.mark.usefixtures("fake_flash")
def test_the_stand_in_refuses_what_the_library_refuses() -> None:
    refuse(AttentionWorld("flash-attn", 128, window=8, dtype=torch.bfloat16), "no multiple of 256")
    refuse(AttentionWorld("flash-attn", P, window=8), "neither bf16 nor fp16")
    refuse(AttentionWorld("flash-attn", P, window=8, dtype=torch.bfloat16, head_dim=264), "head dimension")


def engine(directory: Path, backend: str, **options: object) -> LLM:
    return LLM(
        str(directory), kv_cache_gib=0.02, max_seqs=4, step_tokens=200, threads=1, attention_backend=backend,
        **{"dtype": "fp32", **options},
    )  # fmt: skip


@pytest.fixture
def _anywhere(fake_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in runs on a CPU and may take fp32; check_flash has tests of its own."""
    monkeypatch.setattr(fake_flash_attn, "DTYPES", fake_flash_attn.DTYPES | {torch.float32})
    monkeypatch.setattr("cabochon.engine.load.check_flash", lambda *_: None)


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_chunks_hits_decodes_and_windows_give_the_tokens_of_the_torch_backend(
    request: pytest.FixtureRequest, model: str
) -> None:
    directory = request.getfixturevalue(model)
    ours, oracle = engine(directory, "flash-attn"), engine(directory, "torch", page_tokens=P)
    assert (ours.info.attention_backend, ours.info.page_tokens) == ("flash-attn", P)
    rng = np.random.default_rng(0)
    shared = rng.integers(6, ours.info.vocab_size, P + 2).tolist()
    prompts = [shared + rng.integers(6, ours.info.vocab_size, n).tolist() for n in (1, 5, P - 30)]
    prompts.append(prompts[0][: P - 6])  # its output passes the border of a page
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for batch in (prompts[:1], prompts[1:]):  # the second finds a prefix in the cache
        got, expected = ours.generate(batch, params), oracle.generate(batch, params)
        assert [one.token_ids for one in got] == [one.token_ids for one in expected]
        assert [one.cached_tokens for one in got] == [one.cached_tokens for one in expected]
    assert [one.cached_tokens for one in got] == [P, P, 0]
    assert fake_flash_attn.calls["kvcache"]
    assert fake_flash_attn.calls["varlen"]


def test_an_engine_without_what_it_needs_is_refused_before_weights_are_looked_for(
    tiny_gemma2_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_gemma2_dir / "config.json").read_bytes())
    config = EngineConfig(attention_backend="flash-attn", device="cpu", threads=torch.get_num_threads())
    with pytest.raises(ConfigError, match="flash-attn needs an NVIDIA GPU, got cpu: use device cuda"):
        load_engine(config, tmp_path)
