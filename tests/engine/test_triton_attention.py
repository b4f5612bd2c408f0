"""The engine on the GPU's kernels, run by Triton's interpreter, beside the engine on the torch definition."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from forward import Forward
from random_gemma import model_config, random_gemma2

from cabochon.engine.llm import LLM
from cabochon.engine.plan import Plan
from cabochon.engine.sampling_params import SamplingParams


def engine(directory: Path, backend: str, **options: Any) -> LLM:
    return LLM(
        str(directory), dtype="fp32", page_tokens=4, kv_cache_gib=0.01, max_seqs=4, step_tokens=16, threads=1,
        attention_backend=backend, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("model", ["small_gemma2_dir", "small_gemma3_dir"])
def test_chunks_hits_decodes_and_windows_give_the_tokens_of_the_torch_backend(
    request: pytest.FixtureRequest, model: str
) -> None:
    directory = request.getfixturevalue(model)
    ours, oracle = engine(directory, "triton"), engine(directory, "torch")
    assert ours.info.attention_backend == "triton"
    rng = np.random.default_rng(0)
    shared = rng.integers(6, ours.info.vocab_size, 9).tolist()  # more than a window of 8
    prompts = [shared + rng.integers(6, ours.info.vocab_size, n).tolist() for n in (1, 3, 9)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for batch in (prompts[:1], prompts[1:]):  # the second finds a prefix in the cache
        got, expected = ours.generate(batch, params), oracle.generate(batch, params)
        assert [one.token_ids for one in got] == [one.token_ids for one in expected]
        assert [one.cached_tokens for one in got] == [one.cached_tokens for one in expected]
    assert got[0].cached_tokens
    tail = prompts[0][:6]
    close = [model_engine.core.prompt_logits(tail) for model_engine in (ours, oracle)]
    assert (close[0] - close[1]).abs().max() < 1e-4


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("work", [((0, 1), (1, 2)), ((0, 1),), ((1, 2),)], ids=str)
def test_rows_of_no_sequence_are_zero(work: tuple[tuple[int, int], ...]) -> None:
    """Whatever the memory held: for models that write K and V by attend."""
    hf = random_gemma2(num_hidden_layers=2)
    forward = Forward(model_config(hf.config), dict(hf.state_dict()), backend="triton", max_len=64)
    rows = [forward.add(list(range(3, 9))) for _ in range(2)]
    forward.step([(rows[0], 5)])
    forward.step([(rows[row], n) for row, n in work])  # gives their tokens pages
    row_ids, lens = np.array(work, np.int32).T
    starts = forward.rows.num_computed[row_ids] - lens
    plan = Plan(row_ids, starts, lens, np.ones(len(work), bool), int((lens == 1).sum()))
    inputs = forward.attention.prepare(plan, forward.rows)
    q, k, v = (torch.ones(8, heads, 16) for heads in (4, 2, 2))
    poison = torch.full_like(q, torch.nan)
    with mock.patch.object(torch, "empty_like", return_value=poison):
        out = forward.attention.attend(0, q, k, v, inputs)
    assert (out[: lens.sum()] != 0).all()
    assert not out[lens.sum() :].any()


@pytest.mark.usefixtures("triton_interpreter")
def test_fp8_pages_are_hit_leave_windows_and_are_all_given_back(small_gemma2_dir: Path) -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(6, 100, 13).tolist()  # more than a window of 8
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    ours = engine(small_gemma2_dir, "triton", kv_dtype="fp8")
    first, second = (ours.generate([prompt], params)[0] for _ in range(2))
    assert first.cached_tokens == 0
    assert second.cached_tokens == 12
    assert first.token_ids == second.token_ids
    whole = ours.core.prompt_logits(prompt + first.token_ids[:3])  # one chunk, no hit, all pages held
    assert whole.isfinite().all()
    assert int(whole.argmax()) == first.token_ids[3]
    assert ours.core.stats().pages_used == 0
    ours.core.scheduler.check()
