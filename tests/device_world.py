"""Engines on the device runner, in Triton's interpreter, on a stream that does its work as late as it can."""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.engine import load as load_module
from cabochon.engine.config import EngineConfig
from cabochon.engine.core import EngineCore
from cabochon.engine.device_runner import DeviceRunner
from cabochon.engine.load import load_engine
from cabochon.engine.messages import GenerateRequest, RequestOutput
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.streams import CpuStream
from cabochon.kernels.prepare_inputs import DecodeInputs

Value = TypeVar("Value")
Wanted = dict[str, tuple[list[int], SamplingParams]]


class LazyStream(CpuStream):
    """Work runs, in order, when somebody waits for it: whatever the host changed by then must not matter."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()
        self.most_waiting = 0

    def run(self, work: Callable[[], Value]) -> Callable[[], Value]:
        values: list[Value] = []
        self.queue.append(lambda: values.append(work()))
        self.most_waiting = max(self.most_waiting, len(self.queue))

        def wait() -> Value:
            with torch.inference_mode():
                while not values:
                    self.queue.popleft()()
            return values[0]

        return wait

    def host_buffer(self, num_words: int) -> Tensor:
        return torch.full((num_words,), -1, dtype=torch.int32)


class DeviceEngine:
    """A core on the device runner, and what its stream and graphs went through."""

    def __init__(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, *, has_graphs: bool = True, **options: object
    ) -> None:
        defaults = {
            "model": "tiny", "dtype": "fp32", "page_tokens": 4, "max_seqs": 8, "step_tokens": 16,
            "kv_cache_gib": 0.01, "threads": 1, "attention_backend": "triton",
        }  # fmt: skip
        self.stream = LazyStream()
        self.replays = 0
        self.graph_inputs: list[weakref.ref[Tensor]] = []
        with monkeypatch.context() as patch:
            patch.setattr(load_module, "stream_for", lambda device: self.stream)
            config = EngineConfig(**{**defaults, **options})
            self.core, self.info = load_engine(config, directory, expects_grammars=False)
        runner = self.core._runner
        assert isinstance(runner, DeviceRunner)
        if has_graphs:
            runner.add_graphs([4, 8], self._capture)
            while self.core.get_ready():
                pass

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        closures = [cell.cell_contents for cell in work.__closure__ or ()]
        buffers = [one for one in closures if isinstance(one, DecodeInputs)]
        self.graph_inputs += [weakref.ref(one) for one in itertools.chain(*buffers)]

        def replay() -> None:
            self.replays += 1
            work()

        return replay

    def run(
        self,
        requests: Wanted,
        at_step: Mapping[int, str] | None = None,
        adapters: Mapping[str, str | None] | None = None,
    ) -> dict[str, list[RequestOutput]]:
        """As run_core."""
        return run_core(self.core, requests, at_step, adapters)


def run_core(
    core: EngineCore,
    requests: Wanted,
    at_step: Mapping[int, str] | None = None,
    adapters: Mapping[str, str | None] | None = None,
) -> dict[str, list[RequestOutput]]:
    """All outputs by request. at_step: aborts, by the number of the step. adapters: by request."""
    found: dict[str, list[RequestOutput]] = {name: [] for name in requests}
    for name, (ids, params) in requests.items():
        adapter = (adapters or {}).get(name)
        core.add(GenerateRequest(request_id=name, prompt_ids=ids, params=params, adapter=adapter))
    for step in itertools.count():
        if not core.has_work:
            return found
        if at_step and step in at_step:
            core.abort(at_step[step])
        outputs, refusals = core.step()
        assert not refusals, refusals
        for output in outputs:
            found[output.request_id].append(output)
        core.scheduler.check()
    raise AssertionError


def tokens(outputs: dict[str, list[RequestOutput]]) -> dict[str, list[int]]:
    return {name: [i for one in each for i in one.token_ids] for name, each in outputs.items()}


def greedy(max_tokens: int, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(6, 90, length).tolist()
