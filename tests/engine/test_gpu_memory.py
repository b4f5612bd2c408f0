"""What a GPU has left for pages. The probe is run on the CPU: it must be whole steps, and leave nothing."""

from pathlib import Path

import pytest
import torch

from cabochon.engine import gpu_memory
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


@pytest.mark.parametrize(("max_seqs", "step_tokens"), [(4, 64), (8, 8), (1, 32), (16, 512)])
def test_the_probe_fills_a_step_and_leaves_the_core_idle(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, max_seqs: int, step_tokens: int
) -> None:
    config = EngineConfig(
        dtype="fp32", page_tokens=4, kv_cache_gib=0.01, max_seqs=max_seqs, step_tokens=step_tokens, threads=1
    )
    core, info = load_engine(config, tiny_gemma2_dir)
    steps: list[int] = []
    run = core.step

    def step() -> object:
        found = run()
        steps.append(core.stats().step_tokens)
        return found

    monkeypatch.setattr(core, "step", step)
    run_probe(core, step_tokens=step_tokens, max_seqs=max_seqs, max_model_len=info.max_model_len)
    assert steps[0] == step_tokens // max_seqs * max_seqs, "the first step must be as large as any"
    stats = core.stats()
    assert not core.has_work
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.prompt_tokens == step_tokens
    assert stats.generation_tokens == 3 * max_seqs
    assert stats.steps <= 4


class Graphs:
    """A core of which only the graphs count: each capture takes what `sizes` says."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.free = 10_000

    @property
    def num_unprepared(self) -> int:
        return len(self.sizes)

    def get_ready(self) -> None:
        self.free -= self.sizes.pop()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([], 0), ([700], 700), ([5, 700], 705), ([5, 5, 5, 5, 700], 720), ([-3, 700], 700)],
)
def test_graphs_take_the_largest_and_a_bit_for_each_of_the_others(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], expected: int
) -> None:
    core = Graphs(sizes)
    monkeypatch.setattr(gpu_memory, "_free_bytes", lambda device: core.free)
    assert gpu_memory.measure_graphs(core, torch.device("cuda")) == expected  # type: ignore[arg-type]
