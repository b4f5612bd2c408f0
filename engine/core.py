"""The whole engine: schedule, run, update. In-process offline, in a child process under the server."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future

from torch import Tensor

from cabochon.engine.errors import BadGrammar, ComputeError, EngineError, RequestError
from cabochon.engine.grammar import Grammars, Matcher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import EngineStats, GenerateRequest, Refusal, RequestOutput, TokenLogprobs
from cabochon.engine.plan import Plan, StepResult
from cabochon.engine.rows import Rows
from cabochon.engine.runner import Runner
from cabochon.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

Logprobs = list[TokenLogprobs] | None

COMPILE_LIMIT_S = 30.0  # fuel bounds it to less; the first one waits for the tokenizer as well
WAIT_S = 0.002  # between looks at a grammar when there is nothing else to do
RATE_SMOOTHING = 0.1  # weight of the newest step in the prefill rate


class EngineCore:
    """Requests in with `add`, tokens out of `step`. Single-threaded; consistent between steps."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, rows: Rows, cache: KVCache, grammars: Grammars
    ) -> None:
        self.scheduler = scheduler
        self._grammars = grammars
        self._compiling: dict[str, tuple[GenerateRequest, Future[Matcher], float]] = {}  # until when, too
        self._cache = cache
        self._runner = runner
        self._rows = rows
        self._steps = 0
        self._step_tokens = 0
        self._prefill_tokens_per_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._compiling)

    def add(self, request: GenerateRequest) -> None:
        """Accept a request. Raises RequestError, and then nothing has changed.

        A grammar is compiled aside, and refused by a later step if it must be.
        """
        grammar = request.params.grammar
        if grammar is None:
            self.scheduler.add(request)
        else:
            self.scheduler.check_new(request)
            deadline_s = time.monotonic() + COMPILE_LIMIT_S
            self._compiling[request.request_id] = (request, self._grammars.compile(grammar), deadline_s)

    def abort(self, request_id: str) -> None:
        """End a request and free its pages at once. Unknown ids are ignored."""
        self._compiling.pop(request_id, None)
        self.scheduler.abort(request_id)

    def publish(self, request_id: str) -> None:
        """Let other requests share the pages of a private one. Unknown ids are ignored."""
        if request_id in self._compiling:
            request, future, deadline_s = self._compiling[request_id]
            request = dataclasses.replace(request, is_private=False)
            self._compiling[request_id] = (request, future, deadline_s)
        self.scheduler.publish(request_id)

    def step(self) -> tuple[list[RequestOutput], list[Refusal]]:
        """One step: new tokens of every request in it, and the requests it had to give up."""
        refusals = self._add_compiled()
        started_s = time.monotonic()
        plan = self.scheduler.schedule()
        if plan is None:
            self._step_tokens = 0
            if self.has_work and not refusals:
                time.sleep(WAIT_S)  # for a grammar, in another thread
            return [], refusals
        for request in self.scheduler.take_admitted():
            self._runner.sampler.set_row(request)
        result = self._runner.run(plan, self._rows)
        failed = self._failures(plan, result)
        self._follow_grammars(result)
        logprobs = self._logprobs(plan, result)
        outputs = self.scheduler.update(plan, result.token_ids)
        for output in outputs if logprobs else ():
            output.logprobs, output.prompt_logprobs = logprobs.get(output.request_id, (None, None))
        self._steps += 1
        self._step_tokens = plan.num_tokens
        self._measure(plan.num_tokens - plan.num_decodes, plan.num_decodes, time.monotonic() - started_s)
        for refusal in failed:
            self.abort(refusal.request_id)
        gone = {refusal.request_id for refusal in failed}
        return [output for output in outputs if output.request_id not in gone], refusals + failed

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

    def _logprobs(self, plan: Plan, result: StepResult) -> dict[str, tuple[Logprobs, Logprobs]]:
        """By request id: of the new token, and of the prompt if that token is the first."""
        prompts: dict[str, Logprobs] = {}
        for row, (start, found) in result.prompt_logprobs.items():
            request = self.scheduler.request(row)
            request.prompt_logprobs += found[len(request.prompt_logprobs) - start :]  # the rest is known
            if request.num_output == 0 and row in plan.rows[plan.samples]:
                prompts[request.request_id] = request.prompt_logprobs
        tokens: dict[str, Logprobs] = {
            self.scheduler.request(row).request_id: [one] for row, one in result.logprobs.items()
        }
        return {name: (tokens.get(name), prompts.get(name)) for name in {**tokens, **prompts}}

    def _add_compiled(self) -> list[Refusal]:
        """Requests whose grammar is ready join the queue; those whose grammar is no good are refused."""
        refusals = []
        for request_id, (request, future, deadline_s) in list(self._compiling.items()):
            is_over = time.monotonic() > deadline_s
            if not future.done() and not is_over:
                continue
            del self._compiling[request_id]
            try:
                matcher = _compiled(future)
                added = self.scheduler.add(request, matcher)
                added.mask = self._grammars.next_mask(matcher)
            except RequestError as error:
                refusals.append(Refusal.of(request_id, error))
        return refusals

    def _follow_grammars(self, result: StepResult) -> None:
        """Rows that got a token move on in their grammar, and their next masks are begun; late ones wait."""
        for row in result.late:
            self.scheduler.defer(row)
        for row, token_id in result.bound.items():
            request = self.scheduler.request(row)
            assert request.matcher is not None
            request.is_complete = request.matcher.advance(token_id)
            request.mask = None if request.is_complete else self._grammars.next_mask(request.matcher)

    def _failures(self, plan: Plan, result: StepResult) -> list[Refusal]:
        """Requests without a next token end with an error; the others never notice."""
        failed: list[tuple[int, EngineError]] = [
            (row, ComputeError("logits must be finite, the model gave NaN: check it with `cabochon verify`"))
            for row in plan.rows[plan.samples][~result.is_finite].tolist()
        ]
        failed += [
            (row, BadGrammar("the grammar must stay within its limits, it became too complex: simplify it"))
            for row in result.stuck
        ]
        return [Refusal.of(self.scheduler.request(row).request_id, error) for row, error in failed]

    def _measure(self, prefill_tokens: int, decodes: int, step_s: float) -> None:
        """Prompt tokens per second, from steps that are mostly prefill: what a waiting request will see."""
        if prefill_tokens < max(decodes, 32):
            return
        rate = prefill_tokens / step_s
        old = self._prefill_tokens_per_s
        self._prefill_tokens_per_s = old + RATE_SMOOTHING * (rate - old) if old else rate


def _compiled(future: Future[Matcher]) -> Matcher:
    """Raises BadGrammar, whatever went wrong: a client's grammar must not end the engine."""
    if not future.done():
        raise BadGrammar(f"a grammar must compile within {COMPILE_LIMIT_S:g} s, it has not: simplify it")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BadGrammar):
        raise error
    logger.error("grammar failed error=%s", type(error).__name__)
    raise BadGrammar(f"a grammar must compile, it gave {type(error).__name__}: simplify it")
