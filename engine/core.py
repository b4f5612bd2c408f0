"""The whole engine: schedule, run, update. In-process offline, in a child process under the server."""

import dataclasses
import time
from collections.abc import Sequence

from torch import Tensor

from cabochon.engine.errors import ComputeError
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import EngineStats, GenerateRequest, Refusal, RequestOutput
from cabochon.engine.rows import Rows
from cabochon.engine.runner import Runner
from cabochon.engine.scheduler import Scheduler

RATE_SMOOTHING = 0.1  # weight of the newest step in the prefill rate


class EngineCore:
    """Requests in with `add`, tokens out of `step`. Single-threaded; consistent between steps."""

    def __init__(self, scheduler: Scheduler, runner: Runner, rows: Rows, cache: KVCache) -> None:
        self.scheduler = scheduler
        self._cache = cache
        self._runner = runner
        self._rows = rows
        self._steps = 0
        self._step_tokens = 0
        self._prefill_tokens_per_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: GenerateRequest) -> None:
        """Accept a request. Raises RequestError, and then nothing has changed."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request and free its pages at once. Unknown ids are ignored."""
        self.scheduler.abort(request_id)

    def publish(self, request_id: str) -> None:
        """Let other requests share the pages of a private one. Unknown ids are ignored."""
        self.scheduler.publish(request_id)

    def step(self) -> tuple[list[RequestOutput], list[Refusal]]:
        """One step: new tokens of every request in it, and the requests it had to give up."""
        started_s = time.monotonic()
        plan = self.scheduler.schedule()
        if plan is None:
            return [], []
        for request in self.scheduler.take_admitted():
            self._runner.sampler.set_row(request)
        sampled = self._runner.run(plan, self._rows)
        failed = [self.scheduler.request_id(row) for row in plan.rows[plan.samples][~sampled.is_finite]]
        outputs = self.scheduler.update(plan, sampled.token_ids)
        self._steps += 1
        self._step_tokens = plan.num_tokens
        self._measure(plan.num_tokens - plan.num_decodes, plan.num_decodes, time.monotonic() - started_s)
        return self._give_up(outputs, failed)

    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of the token after `token_ids`: [V] fp32, softcapped. Only while idle, for verification."""
        assert not self.has_work, "the rows are in use"
        row = self._rows.take(list(token_ids), len(token_ids))
        try:
            if not self._cache.extend(row, len(token_ids)):
                raise ValueError(
                    f"the pool must hold all {len(token_ids)} tokens at once: raise kv_cache_gib"
                )
            return self._runner.last_logits(row, self._rows)
        finally:
            self._cache.free(row)
            self._rows.give_back(row)

    def stats(self) -> EngineStats:
        """Gauges and counters after the last step."""
        return dataclasses.replace(
            self.scheduler.stats(),
            steps=self._steps,
            step_tokens=self._step_tokens,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
        )

    def _give_up(
        self, outputs: list[RequestOutput], failed: list[str]
    ) -> tuple[list[RequestOutput], list[Refusal]]:
        """A request whose logits are NaN ends with an error; the others never notice."""
        for request_id in failed:
            self.abort(request_id)
        refusals = [
            Refusal(
                request_id=request_id,
                error=ComputeError.__name__,
                message="logits must be finite, the model gave NaN: check it with `cabochon verify`",
            )
            for request_id in failed
        ]
        return [output for output in outputs if output.request_id not in failed], refusals

    def _measure(self, prefill_tokens: int, decodes: int, step_s: float) -> None:
        """Prompt tokens per second, from steps that are mostly prefill: what a waiting request will see."""
        if prefill_tokens < max(decodes, 32):
            return
        rate = prefill_tokens / step_s
        old = self._prefill_tokens_per_s
        self._prefill_tokens_per_s = old + RATE_SMOOTHING * (rate - old) if old else rate
