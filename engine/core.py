"""The whole engine: schedule, run, update. In-process offline, in a child process under the server."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from cabochon.engine.adapters.registry import Adapters
from cabochon.engine.adapters.slots import LoadedAdapter
from cabochon.engine.errors import BadGrammar, ComputeError, EngineError, RequestError, UnknownAdapter
from cabochon.engine.grammars import Grammars, Matcher, State
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import (
    EngineStats,
    GenerateRequest,
    LoadAdapter,
    Refusal,
    RequestOutput,
    TokenLogprobs,
    UnloadAdapter,
)
from cabochon.engine.plan import Plan, StepResult
from cabochon.engine.rows import Rows
from cabochon.engine.runner import StepRunner
from cabochon.engine.scheduler import Scheduler

if TYPE_CHECKING:  # pyzmq is optional
    from cabochon.engine.kv_event_socket import KVEventSocket

logger = logging.getLogger(__name__)

Logprobs = list[TokenLogprobs] | None

COMPILE_WAIT_S = 60.0  # for its turn and the compilation, which has limits of its own
WAIT_S = 0.002  # between looks at a grammar when there is nothing else to do
RATE_SMOOTHING = 0.1  # weight of the newest step in the prefill rate


class EngineCore:
    """Requests in with `add`, tokens out of `step`. Single-threaded; consistent between calls."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        rows: Rows,
        cache: KVCache,
        grammars: Grammars,
        adapters: Adapters,
        *,
        depth: int = 1,
        kv_events: "KVEventSocket | None" = None,
    ) -> None:
        """depth: steps on the device at once, 1 or 2. kv_events: tells others after each."""
        self.scheduler = scheduler
        self.adapters = adapters
        self._grammars = grammars
        self._compiling: dict[str, _Compiling] = {}
        self._matchers: dict[str, Matcher] = {}  # by request id, of all requests that have one
        self._cache = cache
        self._runner = runner
        self._rows = rows
        self._depth = depth
        self.kv_events = kv_events
        self._flying: deque[_Flying] = deque()
        self._landed_s = 0.0
        self._steps = 0
        self._step_tokens = 0
        self._prefill_tokens_per_s = 0.0

    @property
    def has_work(self) -> bool:
        has_work = self.scheduler.has_work or bool(self._compiling)
        return has_work or self.adapters.is_busy or self.scheduler.slots.has_changes

    def add(self, request: GenerateRequest) -> None:
        """Accept a request. Raises RequestError, and then nothing has changed.

        A grammar is compiled aside, and refused by a later step if it must be.
        """
        grammar, adapter = request.params.grammar, self.adapters.get(request.adapter)
        if grammar is None:
            self.scheduler.add(request, adapter=adapter)
        else:
            self.scheduler.check_new(request)
            until_s = time.monotonic() + COMPILE_WAIT_S
            self._compiling[request.request_id] = _Compiling(request, adapter, until_s)
            self._matchers[request.request_id] = self._grammars.open(request.request_id, grammar)

    def abort(self, request_id: str) -> None:
        """End a request and free its pages at once. Unknown ids are ignored."""
        self._compiling.pop(request_id, None)
        self._forget_matcher(request_id)
        self.scheduler.abort(request_id)

    def publish(self, request_id: str) -> None:
        """Let other requests share the pages of a private one. Unknown ids are ignored."""
        if request_id in self._compiling:
            one = self._compiling[request_id]
            public = dataclasses.replace(one.request, is_private=False)
            self._compiling[request_id] = one._replace(request=public)
        self.scheduler.publish(request_id)

    def load_adapter(self, message: LoadAdapter) -> None:
        """Answered among the replies of a later step."""
        self.adapters.start_load(message)

    def unload_adapter(self, message: UnloadAdapter) -> None:
        """Answered at once, among the replies."""
        try:
            self.drop_adapter(message.name)
        except UnknownAdapter as error:
            self.adapters.refuse(message.reply_to, error)
        else:
            self.adapters.reply(message.reply_to)

    def drop_adapter(self, name: str) -> None:
        """No new request can name it; those that have keep it until they end. Raises UnknownAdapter."""
        self._forget_adapter(self.adapters.remove(name))

    def _forget_adapter(self, adapter: LoadedAdapter) -> None:
        self.scheduler.slots.forget(adapter)
        if self.kv_events is not None:
            self.kv_events.events.retire(adapter)

    def step(self) -> tuple[list[RequestOutput], list[Refusal]]:
        """One step: new tokens of every request in it, and the requests it had to give up.

        With a depth of 2 a step is launched before the tokens of the one before are known, and runs while
        the host is busy with those. A grammar's mask needs the token before it: then the depth is 1.
        """
        for replaced in self.adapters.finish_loads():
            self._forget_adapter(replaced)
        outputs, refusals = self._hear_grammars() if self._matchers else ([], [])
        depth = 1 if self._matchers else self._depth
        while len(self._flying) >= depth:
            self._land(outputs, refusals)
        plan = self.scheduler.schedule()
        for slot, adapter in self.scheduler.slots.take_changes():
            self._runner.put_adapter(slot, None if adapter is None else adapter.weights)
        if plan is not None:
            self._launch(plan, is_ahead=depth > 1)
        elif not self._flying:
            self._step_tokens = 0
            if self.has_work and not refusals and not outputs:
                self._grammars.poll(WAIT_S)
        if self._flying and (plan is None or len(self._flying) >= depth):
            self._land(outputs, refusals)
        if self.kv_events is not None:
            self.kv_events.send()
        return outputs, refusals

    def _launch(self, plan: Plan, *, is_ahead: bool) -> None:
        for request in self.scheduler.take_admitted():
            self._runner.admit(request)
        started_s = time.monotonic()
        self._flying.append(_Flying(plan, self._runner.launch(plan, self._rows), started_s))
        if is_ahead:
            self.scheduler.advance(plan)

    def _land(self, outputs: list[RequestOutput], refusals: list[Refusal]) -> None:
        """Wait for the oldest step and enter its results."""
        plan, wait, launched_s = self._flying[0]
        result = wait()  # an interrupt here has changed nothing
        dropped = self.scheduler.dropped(plan)
        result.without(dropped)
        failed = self._failures(plan, result, dropped)
        for row in result.late:
            self.scheduler.defer(row)
        bound = [(self.scheduler.request(row).request_id, token) for row, token in result.bound.items()]
        logprobs = self._logprobs(plan, result)
        self._flying.popleft()
        new = self.scheduler.update(plan, result.token_ids)
        for output in new if logprobs else ():
            output.logprobs, output.prompt_logprobs = logprobs.get(output.request_id, (None, None))
        self._follow_grammars(bound, new)
        self._count_step(plan, launched_s)
        for refusal in failed:
            self.abort(refusal.request_id)
        if failed:
            gone = {refusal.request_id for refusal in failed}
            new = [output for output in new if output.request_id not in gone]
            refusals += failed
        outputs += new

    @property
    def num_unprepared(self) -> int:
        """How often `get_ready` has something to do."""
        return self._runner.num_unprepared

    def get_ready(self) -> bool:
        """While idle: a piece of work that makes later steps faster. Returns whether there is more."""
        self._land_leftovers()
        self._runner.get_ready()
        if self.kv_events is not None:
            self.kv_events.send()
        return self.num_unprepared > 0 or (self.kv_events is not None and self.kv_events.events.has_more)

    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of the token after `token_ids`: [V] fp32, softcapped. Only while idle, for verification."""
        self._land_leftovers()
        row = self._rows.take(np.array(token_ids, np.int32), len(token_ids))
        try:
            if not self._cache.extend(row, len(token_ids)):
                raise ValueError(
                    f"the pool must hold all {len(token_ids)} tokens at once: raise kv_cache_gib"
                )
            return self._runner.last_logits(row, self._rows)
        finally:
            self._cache.free(row)
            self._rows.give_back(row)

    def _land_leftovers(self) -> None:
        """Steps behind the end of the last request. Only while idle."""
        outputs: list[RequestOutput] = []
        while self._flying:
            self._land(outputs, [])
        assert not outputs, "a step was running"
        assert not self.has_work, "the rows are in use"

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

    def _hear_grammars(self) -> tuple[list[RequestOutput], list[Refusal]]:
        """Requests whose grammar allows nothing more end; those whose grammar is compiled join the queue."""
        self._grammars.poll()
        completed = []
        for matcher in self._grammars.take_completed():
            if self._matchers.get(matcher.request_id) is not matcher:
                continue  # aborted since
            completed.append(self.scheduler.complete(matcher.request_id))
            self._forget_matcher(matcher.request_id)
        refusals = []
        for request_id, one in list(self._compiling.items()):
            matcher = self._matchers[request_id]
            is_over = time.monotonic() > one.until_s
            if matcher.state is State.COMPILING and not is_over:
                continue
            del self._compiling[request_id]
            try:
                self.scheduler.add(one.request, _compiled(matcher), one.adapter)
            except RequestError as error:
                self._forget_matcher(request_id)
                refusals.append(Refusal.of(request_id, error))
        return completed, refusals

    def _follow_grammars(self, bound: list[tuple[str, int]], outputs: list[RequestOutput]) -> None:
        """Requests that got a token move on in their grammar, unless they have ended."""
        if not self._matchers:
            return
        for output in outputs:
            if output.finish_reason is not None:
                self._forget_matcher(output.request_id)
        for request_id, token_id in bound:
            if request_id in self._matchers:
                self._matchers[request_id].advance(token_id)
        self._grammars.flush()

    def _forget_matcher(self, request_id: str) -> None:
        matcher = self._matchers.pop(request_id, None)
        if matcher is not None:
            self._grammars.close(matcher)

    def _failures(self, plan: Plan, result: StepResult, dropped: set[int]) -> list[Refusal]:
        """Requests without a next token end with an error; the others never notice."""
        failed: list[tuple[int, EngineError]] = [
            (row, ComputeError("logits must be finite, the model gave NaN: check it with `cabochon verify`"))
            for row in plan.rows[plan.samples][~result.is_finite].tolist()
            if row not in dropped
        ]
        for row, _ in failed:  # its pages may hold NaN: who has the same prefix must not find them
            self._cache.disown(self.scheduler.request(row))
        for row in result.stuck:
            matcher = self.scheduler.request(row).matcher
            assert matcher is not None
            failed.append((row, _bad_grammar(matcher, "must allow a next token, it allows none: correct it")))
        return [Refusal.of(self.scheduler.request(row).request_id, error) for row, error in failed]

    def _count_step(self, plan: Plan, launched_s: float) -> None:
        """And prompt tokens per second, from steps that are mostly prefill: what a waiting request sees."""
        now = time.monotonic()
        step_s, self._landed_s = now - max(launched_s, self._landed_s), now  # it began behind the one before
        self._steps += 1
        self._step_tokens = plan.num_tokens
        prefill_tokens = plan.num_tokens - plan.num_decodes
        if prefill_tokens < max(plan.num_decodes, 32):
            return
        rate = prefill_tokens / step_s
        old = self._prefill_tokens_per_s
        self._prefill_tokens_per_s = old + RATE_SMOOTHING * (rate - old) if old else rate


class _Compiling(NamedTuple):
    """A request whose grammar is compiled, its adapter, and how long it waits for that."""

    request: GenerateRequest
    adapter: LoadedAdapter | None
    until_s: float


class _Flying(NamedTuple):
    """A step on the device, how to get its results, and when it was launched."""

    plan: Plan
    wait: Callable[[], StepResult]
    launched_s: float


def _compiled(matcher: Matcher) -> Matcher:
    """Raises BadGrammar if it is not."""
    if matcher.state in (State.COMPILING, State.FAILED):
        raise _bad_grammar(matcher, "must get its turn to compile, too many are ahead of it: try again later")
    return matcher


def _bad_grammar(matcher: Matcher, otherwise: str) -> BadGrammar:
    param = matcher.grammar.param
    return BadGrammar(f"{param} {matcher.error or otherwise}", param)
