"""The performance gate: counts and ratios that any machine finds alike, held to those of the last commit.

    python benchmarks/bench_check.py             # fails if one is over 10 % above benchmarks/baseline.json
    python benchmarks/bench_check.py --update    # after a change that is meant: writes that file

No time is measured: a step that does more work in Python, an operator more in every layer, a page more a
sequence, a longer message show in counts, on a busy machine, too. Lower is better for all of them.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import memory
import numpy as np
import step_overhead
from counters import TorchWork, python_work
from gpu.random_weights import RandomCheckpoint, configuration, directory

from cabochon.engine.channel import encode
from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.load import load_engine
from cabochon.engine.messages import GenerateRequest, RequestOutput, StepOutput
from cabochon.engine.sampling_params import SamplingParams

Counts = dict[str, float]
Group = Callable[[], Iterator[tuple[str, float]]]
BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.10
RUNNING, STEPS = 256, 8
BATCHES = (1, 2, 3, 5, 8, 13)
numbers = itertools.count()


def host() -> Iterator[tuple[str, float]]:
    """A decode step of many rows: our Python, and the message that leaves the engine's process."""
    core = step_overhead.core_of(RUNNING)
    outputs: list[RequestOutput] = []
    for _ in range(2):  # the pipeline is full
        _host_step(core, outputs)
    outputs.clear()
    with python_work() as work:
        for _ in range(STEPS):
            _host_step(core, outputs)
    assert len(outputs) == STEPS * RUNNING, "every row gives a token in every step"
    yield "python lines per row and step, 256 running", work.lines / len(outputs)
    yield "python calls per row and step, 256 running", work.calls / len(outputs)
    frame = encode(StepOutput(outputs=outputs[-RUNNING:], stats=core.stats()))
    yield "bytes between the processes per token, 256 running", len(frame) / RUNNING
    core = step_overhead.core_of(1)
    _host_step(core, outputs)
    with python_work() as work:
        for _ in range(STEPS):
            _host_step(core, outputs)
    yield "python lines per step, 1 running", work.lines / STEPS


def _host_step(core: EngineCore, outputs: list[RequestOutput]) -> None:
    plan = core.scheduler.schedule()
    assert plan is not None
    core._launch(plan, is_ahead=True)
    core._land(outputs, [])
    core.stats()


def device() -> Iterator[tuple[str, float]]:
    """The CPU's forward pass of a small Gemma 2: operators, bytes that they allocate, rows of padding."""
    found: dict[int, TorchWork] = {}
    for batch in BATCHES:
        with tiny_engine(prefix_caching=False) as core:
            for index in range(batch):
                _add(core, index, 20 + index, 8)
            core.step()  # the prompts
            with TorchWork() as work:
                outputs, _ = core.step()
            assert len(outputs) == batch, "a decode step of all rows"
            found[batch] = work
    layers = configuration("tiny").num_hidden_layers
    few, many = found[BATCHES[0]], found[BATCHES[-1]]
    yield "torch operators per layer of a decode step", many.operators / layers
    yield "torch operators of 13 rows over those of 1", many.operators / few.operators
    yield "bytes allocated per row of a decode step", many.made_bytes / BATCHES[-1]
    useful = sum(work.products * batch for batch, work in found.items())
    yield "rows of products over rows that are needed", sum(w.product_rows for w in found.values()) / useful
    with tiny_engine(prefix_caching=False, step_tokens=128) as core:
        _add(core, 0, 100, 1)
        with TorchWork() as work:
            core.step()
    yield "torch operators per layer of a prompt of 100", work.operators / layers


def engine() -> Iterator[tuple[str, float]]:
    """Steps that a fixed load takes, and prompt tokens that the prefix cache leaves to compute."""
    pages = memory.Pages(memory.model_of("2b"), memory.kv_layout(memory.model_of("2b"), 16, 2), 32, 4097)
    rng, tokens, ended, steps = np.random.default_rng(0), 0, 0, 0
    for _ in range(48):
        lengths = memory.sharegpt_lengths(rng)
        pages.add(*lengths)
        tokens += sum(lengths)
    while ended < 48:
        ended += pages.step()[2]
        steps += 1
    yield "steps per 1,000 tokens of 48 chats, 32 at once", 1000 * steps / tokens
    with tiny_engine(prefix_caching=True) as core:
        for _ in range(2):
            name = _add(core, 0, 100, 1)
            outputs = [output for _ in range(12) if core.has_work for output in core.step()[0]]
        (last,) = [output for output in outputs if output.request_id == name]
    yield "prompt tokens computed of a prompt seen before", 100 - last.cached_tokens


def kv() -> Iterator[tuple[str, float]]:
    """Pages: of one sequence, and what a busy engine leaves unused."""
    for size in ("2b", "27b"):
        (row,) = memory.sequence(size, 16, [8192])
        yield f"MiB of KV at 8,192 tokens, Gemma 2 {size.upper()}", float(str(row["kv_bytes"])) / 2**20
    busy = memory.busy("2b", 16, seqs=8, requests=16)
    yield "share of used pages without a visible token, 8 chats", float(str(busy["unused_share_mean"]))


GROUPS: tuple[Group, ...] = (host, device, engine, kv)


@contextmanager
def tiny_engine(*, prefix_caching: bool, step_tokens: int = 512) -> Iterator[EngineCore]:
    """Random weights, fp32, one thread, the torch backend."""
    config = EngineConfig(
        model="random", device="cpu", dtype="fp32", attention_backend="torch", threads=1, max_seqs=16,
        step_tokens=step_tokens, kv_cache_gib=0.01, page_tokens=16, prefix_caching=prefix_caching,
    )  # fmt: skip
    with directory(configuration("tiny")) as folder:
        core, _ = load_engine(config, folder, checkpoint=RandomCheckpoint())
        yield core


def _add(core: EngineCore, seed: int, prompt_tokens: int, output_tokens: int) -> str:
    ids = np.random.default_rng(seed).integers(3, 512, prompt_tokens).tolist()
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    name = f"{next(numbers)}"
    core.add(GenerateRequest(request_id=name, prompt_ids=ids, params=params))
    return name


def count(groups: Sequence[Group]) -> Counts:
    """The counts of some groups, by name."""
    return {name: round(value, 4) for group in groups for name, value in group()}


def read(path: Path) -> Counts:
    """A baseline."""
    found: Counts = json.loads(path.read_text())
    return found


def judge(found: Counts, baseline: Counts) -> list[str]:
    """What is wrong, one line each; empty if nothing is."""
    lines = [
        f"{name}: at most {baseline[name] * (1 + TOLERANCE):g} allowed, got {value:g}"
        f" (+{value / baseline[name] - 1:.0%}): find what added it, or commit --update with the reason"
        for name, value in found.items()
        if name in baseline and value > baseline[name] * (1 + TOLERANCE)
    ]
    if strange := found.keys() ^ baseline.keys():
        lines.append(f"counts and {BASELINE.name} must have the same names, got {sorted(strange)}: --update")
    return lines


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--update", action="store_true", help="the counts of now are the baseline")
    p.add_argument("--baseline", type=Path, default=BASELINE)
    args = p.parse_args(argv)
    found = count(GROUPS)
    if args.update:
        args.baseline.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    baseline = read(args.baseline)
    for name, value in found.items():
        change = f"{value / baseline[name] - 1:+.1%}" if name in baseline else "new"
        print(f"{value:12.4f}  {change:>7}  {name}")
    for line in (wrong := judge(found, baseline)):
        print(line, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
