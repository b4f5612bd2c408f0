"""What a decode step costs the host: scheduling, what the device needs to know, results. Without a device.

    python benchmarks/step_overhead.py --running 1 64 256 512 --steps 5000 --churn 8 --out FILE

Time of the thread's CPU, and of the wall, per step of the real scheduler, pages, rows and device runner over
Gemma 2's two layer groups; the stream drops the work and every token is made up. --churn N: every N steps a
request ends by its EOS and another, with a prompt of its own length, takes its place; else
nobody comes or goes. What a request costs when it arrives, before it is scheduled, is `arrival`.
"""

import argparse
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from machine import emit, environment
from numpy.typing import NDArray

from cabochon.engine.adapters.registry import Adapters
from cabochon.engine.core import EngineCore
from cabochon.engine.device_runner import DeviceRunner
from cabochon.engine.hashing import PageHasher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import GenerateRequest, RequestOutput
from cabochon.engine.page_pool import PagePool
from cabochon.engine.plan import StepResult
from cabochon.engine.process import settle_collector
from cabochon.engine.rows import Rows
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.scheduler import Scheduler
from cabochon.engine.streams import CpuStream, Value

PAGE_TOKENS = 16
WINDOWS = (4096, None)
CONTEXT = 8192
VOCAB = 256_000
EOS = 1


class DroppingStream(CpuStream):
    """Takes work and never does it."""

    def run(self, work: Callable[[], Value]) -> Callable[[], Value]:
        return lambda: None  # type: ignore[return-value]


class HostOnlyRunner(DeviceRunner):
    """Results are made up where the device's would be read: EOS for one row every `churn` steps."""

    churn = 0
    num_results = 0

    def _result_of(self, step: Any, wait: Callable[[], None]) -> Callable[[], StepResult]:
        finish = super()._result_of(step, wait)

        def made_up() -> StepResult:
            step.tokens = torch.full((len(step.sampling),), 7, dtype=torch.int32)
            self.num_results += 1
            if self.churn and self.num_results % self.churn == 0:
                step.tokens[self.num_results // self.churn % len(step.tokens)] = EOS
            return finish()

        return made_up


def request_of(index: int) -> GenerateRequest:
    """No two have a prefix in common."""
    rng = np.random.default_rng(index)
    ids = rng.integers(6, VOCAB, rng.integers(800, 1032)).tolist()
    params = SamplingParams(max_tokens=CONTEXT - 1032, temperature=0)
    return GenerateRequest(request_id=f"{index}", prompt_ids=ids, params=params)


def core_of(num_running: int, churn: int = 0) -> EngineCore:
    """An engine with that many decodes, whose graphs are never replayed."""
    rows = Rows(max_seqs=num_running, max_model_len=CONTEXT, num_groups=len(WINDOWS), page_tokens=PAGE_TOKENS)
    cache = KVCache(rows, PagePool(num_running * 2 * CONTEXT // PAGE_TOKENS), PageHasher(b"key"), WINDOWS)
    scheduler = Scheduler(
        rows, cache, step_tokens=max(2048, num_running), eos_token_ids=[EOS], max_model_len=CONTEXT,
        vocab_size=VOCAB,
    )  # fmt: skip
    model: Any = SimpleNamespace(
        config=SimpleNamespace(vocab_size=VOCAB, final_softcap=30.0), embedding=torch.empty(0)
    )
    runner = HostOnlyRunner(model, NoAttention(), rows, DroppingStream(), depth=2)  # type: ignore[arg-type]
    grammars: Any = None
    core = EngineCore(scheduler, runner, rows, cache, grammars, Adapters(None), depth=2)
    for index in range(num_running):
        core.add(request_of(index))
    while (rows.num_tokens <= rows.num_prompt + 4).any():
        core.step()
    _age(cache.pool)
    runner.add_graphs([num_running], lambda work: lambda: None)
    graph = SimpleNamespace(row_ids=torch.empty(num_running), tiles=None)
    runner.graphs._graphs[num_running, False] = graph  # type: ignore
    runner.churn = churn
    return core


def _age(pool: PagePool) -> None:
    """What is free holds old contents, as in a server that has run for a while: they are forgotten first."""
    pages = pool.allocate(pool.num_free)
    for group in range(len(WINDOWS)):
        some = pages[group :: len(WINDOWS)]
        pool.register(some, group, [secrets.token_bytes(16) for _ in some])
    for page in pages:
        pool.release(page)


class NoAttention:
    """Prefills before the measurement ask it for inputs."""

    def prepare(self, plan: Any, rows: Rows, move: Any) -> None:
        return None


def measure(num_running: int, steps: int, churn: int = 0) -> dict[str, object]:
    """Milliseconds until a step is launched, for the results of one, and for a request that arrives."""
    core, num_requests = core_of(num_running, churn), num_running
    settle_collector()
    arrivals_ns: list[NDArray[np.int64]] = []
    times_ns = np.empty((steps, 2, 2))  # of the CPU and of the wall, each before and after the launch
    for step in range(steps):
        marks = [_now_ns()]
        plan = core.scheduler.schedule()
        assert plan is not None
        assert plan.num_decodes >= num_running - 2
        core._launch(plan, is_ahead=True)
        marks.append(_now_ns())
        outputs: list[RequestOutput] = []
        core._land(outputs, [])
        core.stats()
        marks.append(_now_ns())
        times_ns[step] = np.diff(np.array(marks), axis=0).T
        for _ in range(sum(output.finish_reason is not None for output in outputs)):
            request = request_of(num_requests)
            before_ns = _now_ns()
            core.add(request)
            arrivals_ns.append(np.subtract(_now_ns(), before_ns))
            num_requests += 1
    assert num_requests - num_running >= (steps // churn - 2 if churn else 0)
    row: dict[str, object] = {"running": num_running, "steps": steps, "churn": churn}
    parts = {"prepare": times_ns[:, :, 0], "results": times_ns[:, :, 1]}
    if arrivals_ns:
        parts["arrival"] = np.array(arrivals_ns)
    for part, ns in parts.items():  # [n, 2]
        for clock, of_clock in zip(("", "wall_"), ns.T, strict=True):
            for percent in (50, 99):
                row[f"{part}_{clock}p{percent}_ms"] = round(float(np.percentile(of_clock, percent)) / 1e6, 3)
    return {"benchmark": "step_overhead", **row}


def _now_ns() -> tuple[int, int]:
    """Of this thread's CPU, of the wall."""
    return time.thread_time_ns(), time.perf_counter_ns()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--churn", type=int, default=0, help="steps between two ends; 0: none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for num_running in args.running:
        emit({**measure(num_running, args.steps, args.churn), **environment()}, args.out)


if __name__ == "__main__":
    main()
