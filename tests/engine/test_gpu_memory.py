"""What a GPU has left for pages. The probe is run on the CPU: it must be whole steps, and leave nothing."""

from pathlib import Path

import pytest

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.engine.gpu_memory import GIB, pool_bytes, run_probe
from cabochon.engine.load import load_engine


def test_the_pool_is_what_the_share_leaves() -> None:
    given = pool_bytes(total=80 * GIB, used=20 * GIB, peak=2 * GIB, utilization=0.9)
    assert given == int(0.9 * 80 * GIB) - 22 * GIB


@pytest.mark.parametrize("used", [70 * GIB, 90 * GIB])
def test_a_gpu_that_is_full_is_said_to_be(used: int) -> None:
    with pytest.raises(ConfigError, match=r"0\.9 of 80\.0 GiB, \d+\.0 are in use and a step takes 2\.0"):
        pool_bytes(total=80 * GIB, used=used, peak=2 * GIB, utilization=0.9)


@pytest.mark.parametrize(("max_seqs", "step_tokens"), [(4, 64), (8, 8), (1, 32)])
def test_the_probe_fills_a_step_and_leaves_the_core_idle(
    tiny_gemma2_dir: Path, max_seqs: int, step_tokens: int
) -> None:
    config = EngineConfig(
        dtype="fp32", page_tokens=4, kv_cache_gib=0.01, max_seqs=max_seqs, step_tokens=step_tokens, threads=1
    )
    core, info = load_engine(config, tiny_gemma2_dir)
    run_probe(core, step_tokens=step_tokens, max_seqs=max_seqs, max_model_len=info.max_model_len)
    stats = core.stats()
    assert not core.has_work
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.prompt_tokens == step_tokens
    assert stats.generation_tokens == 3 * max_seqs
    assert stats.steps <= 4
