"""What a decode step costs the host: scheduling, what the device needs to know, results. Without a device.

Thread CPU time per step of the real scheduler, pages, rows and device runner over Gemma 2's two layer groups;
the stream drops the work and every token is made up. One row of JSON per number of running requests.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cabochon.engine.adapters.registry import Adapters
from cabochon.engine.core import EngineCore
from cabochon.engine.device_runner import DeviceRunner
from cabochon.engine.hashing import PageHasher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.page_pool import PagePool
from cabochon.engine.plan import StepResult
from cabochon.engine.rows import Rows
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.scheduler import Scheduler
from cabochon.engine.streams import CpuStream, Value

PAGE_TOKENS = 16
WINDOWS = (4096, None)
CONTEXT = 8192
VOCAB = 256_000


class DroppingStream(CpuStream):
    """Takes work and never does it."""

    def run(self, work: Callable[[], Value]) -> Callable[[], Value]:
        return lambda: None  # type: ignore[return-value]


class HostOnlyRunner(DeviceRunner):
    """Results are made up where the device's would be read."""

    def _result_of(self, step: Any, wait: Callable[[], None]) -> Callable[[], StepResult]:
        finish = super()._result_of(step, wait)

        def made_up() -> StepResult:
            step.tokens = torch.full((len(step.sampling),), 7, dtype=torch.int32)
            return finish()

        return made_up


def core_of(num_running: int) -> EngineCore:
    """An engine whose graphs are never replayed."""
    rows = Rows(max_seqs=num_running, max_model_len=CONTEXT, num_groups=len(WINDOWS), page_tokens=PAGE_TOKENS)
    cache = KVCache(rows, PagePool(num_running * 2 * 200), PageHasher(b"key"), WINDOWS)
    scheduler = Scheduler(
        rows, cache, step_tokens=max(2048, num_running), eos_token_ids=[1], max_model_len=CONTEXT,
        vocab_size=VOCAB,
    )  # fmt: skip
    model: Any = SimpleNamespace(
        config=SimpleNamespace(vocab_size=VOCAB, final_softcap=30.0), embedding=torch.empty(0)
    )
    runner = HostOnlyRunner(model, NoAttention(), rows, DroppingStream(), depth=2)  # type: ignore[arg-type]
    grammars: Any = None
    core = EngineCore(scheduler, runner, rows, cache, grammars, Adapters(None), depth=2)
    for index in range(num_running):
        ids = np.random.default_rng(index).integers(6, VOCAB, 1000 + index % 32).tolist()
        params = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
        core.add(GenerateRequest(request_id=f"{index}", prompt_ids=ids, params=params))
    while rows.num_tokens.min() <= rows.num_prompt.max() + 4:
        core.step()
    runner.add_graphs([num_running], lambda work: lambda: None)
    graph = SimpleNamespace(row_ids=torch.empty(num_running), tiles=None)
    runner.graphs._graphs[num_running, False] = graph  # type: ignore
    return core


class NoAttention:
    """Prefills before the measurement ask it for inputs."""

    def prepare(self, plan: Any, rows: Rows, move: Any) -> None:
        return None


def measure(num_running: int, steps: int) -> dict[str, object]:
    """Milliseconds of thread CPU time: until a step is launched, and for the results of one."""
    core = core_of(num_running)
    gc.collect()
    gc.freeze()  # as the engine process does
    times_ns = np.empty((steps, 2))
    for step in range(steps):
        marks = [time.thread_time_ns()]
        plan = core.scheduler.schedule()
        assert plan is not None
        assert plan.num_decodes == num_running
        core._launch(plan, is_ahead=True)
        marks.append(time.thread_time_ns())
        core._land([], [])
        core.stats()
        marks.append(time.thread_time_ns())
        times_ns[step] = np.diff(marks)
    p50, p99 = np.percentile(times_ns, [50, 99], axis=0).round(-3) / 1e6
    return {
        "benchmark": "step_overhead", "running": num_running, "steps": steps,
        "prepare_p50_ms": p50[0], "prepare_p99_ms": p99[0],
        "results_p50_ms": p50[1], "results_p99_ms": p99[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    for num_running in args.running:
        print(json.dumps(measure(num_running, args.steps)), flush=True)


if __name__ == "__main__":
    main()
