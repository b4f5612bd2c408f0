"""The engine on the GPU's kernels, run by Triton's interpreter, beside the engine on the torch definition."""

from pathlib import Path

import numpy as np
import pytest

from cabochon.engine.llm import LLM
from cabochon.engine.sampling_params import SamplingParams


def engine(directory: Path, backend: str) -> LLM:
    return LLM(
        str(directory), dtype="fp32", page_tokens=4, kv_cache_gib=0.01, max_seqs=4, step_tokens=16, threads=1,
        attention_backend=backend,
    )  # fmt: skip


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
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
