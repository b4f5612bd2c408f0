"""Chooses what each step computes, under one token budget.

A request has `num_computed` chasing `num_tokens`: prefill, its chunks, prefix hits and decode differ only in
the distance. Running decodes come first. Of the rest, within a priority, half goes to requests in order of
arrival, so that the oldest always advances, and half to the shortest remaining first, so that a short prompt
never waits behind a long one. When pages run out the worst-ranked running request is preempted: it is
computed again later, mostly from its own cached pages. Knows nothing of tensors.
"""

import time
from collections.abc import Callable, Iterable
from heapq import merge
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.adapters.slots import AdapterSlots, LoadedAdapter
from cabochon.engine.admission import check_request
from cabochon.engine.awaited_pages import AwaitedPages
from cabochon.engine.budget import Budget, Ration
from cabochon.engine.errors import RequestError
from cabochon.engine.flights import Flights
from cabochon.engine.grammars import Matcher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import EngineStats, GenerateRequest, RequestOutput
from cabochon.engine.plan import Plan
from cabochon.engine.request import Request
from cabochon.engine.rows import Rows
from cabochon.engine.running import Running
from cabochon.engine.waiting import WaitingQueue

MAX_CHUNK_TOKENS = 2048  # a sliding group holds window + chunk: longer ones undo what the window saves
MIN_CHUNK_TOKENS = 32  # less of a long prompt is not worth a sequence in the step
WATERMARK = 0.01  # share of the pool kept free at admission, for the decodes that already run


class Scheduler:
    """Owns all requests, their rows and, through KVCache, their pages."""

    def __init__(
        self,
        rows: Rows,
        cache: KVCache,
        *,
        step_tokens: int,
        part_tokens: int | None = None,  # of a long prompt in a step (budget.py); None: no limit
        eos_token_ids: Iterable[int],
        max_model_len: int,
        vocab_size: int,
        max_loras: int = 0,
    ) -> None:
        self._rows = rows
        self._cache = cache
        self._ration = Ration(step_tokens, part_tokens)
        self._max_chunk = min(step_tokens, MAX_CHUNK_TOKENS)
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self.slots = AdapterSlots(max_loras, self._waiting.adapters)
        self._running = Running()
        self._admitted: list[Request] = []
        # Of the step being planned: rows with one token each, those with more left, and what they get
        self._decodes: NDArray[np.intp] = np.empty(0, np.intp)
        self._prefills: NDArray[np.intp] = np.empty(0, np.intp)
        self._chunks: dict[int, int] = {}
        self._promised: dict[int, int] = {}  # row -> pages its prefill will still take; kept while planning
        self._awaited = AwaitedPages(cache)
        self._flights = Flights()
        self._dropped_rows: set[int] = set()  # aborted or late since schedule(): their results do not count
        self._last_lens = np.zeros(rows.max_seqs, np.int32)  # tokens of a row when it can have no more
        self._late: list[Request] = []  # they wait for the mask of their next token
        self._num_arrivals = 0
        self._counts = dict.fromkeys(
            ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions"), 0
        )

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._flights)

    def check_new(self, message: GenerateRequest) -> int:
        """Returns the output tokens it may have at most. Raises RequestError if it cannot be accepted."""
        if message.request_id in self._requests:
            raise RequestError(
                f"request ids must be unique, {message.request_id} is running: send another id"
            )
        return check_request(message, max_model_len=self._max_model_len, vocab_size=self._vocab_size)

    def add(
        self, message: GenerateRequest, matcher: Matcher | None = None, adapter: LoadedAdapter | None = None
    ) -> Request:
        """Accept a request, and hash it: no step waits for that. Raises RequestError: nothing has changed."""
        max_tokens = self.check_new(message)
        request = Request.of(message, self._num_arrivals, max_tokens, self._eos, matcher, adapter)
        self._cache.page_names(request, len(request.token_ids) // self._cache.page_tokens)
        self._num_arrivals += 1
        self._requests[message.request_id] = request
        self._waiting.add(request)
        self._ration.hear(len(message.prompt_ids))
        return request

    def abort(self, request_id: str) -> None:
        """Forget a request and free its pages. Unknown ids are ignored: it may have ended."""
        if request_id in self._requests:
            self._end(self._requests[request_id])

    def complete(self, request_id: str) -> RequestOutput:
        """End a request whose grammar allows nothing more."""
        request = self._requests[request_id]
        self.abort(request_id)
        return request.output([], "stop")

    def publish(self, request_id: str) -> None:
        """Let others share the pages of a private request. Unknown ids are ignored: it may have ended."""
        if request_id in self._requests:
            self._cache.publish(self._requests[request_id])

    def defer(self, row: int) -> None:
        """Its mask is late: the step's result does not count for it, and it waits until the mask is there."""
        self._dropped_rows.add(row)
        self._late.append(self.request(row))

    def schedule(self) -> Plan | None:
        """The next step, its pages taken; None if there is nothing to do but to wait, if anything.

        For masks, or for the results of steps that are on their way.
        """
        self._chunks.clear()
        self._admitted.clear()
        self._dropped_rows.clear()
        self._late = [request for request in self._late if request.is_late and request.row is not None]
        self._can_admit = True  # until somebody waits for pages
        if not self._requests:
            return None
        self._plan_decodes()
        if self._waiting or len(self._prefills):
            self._plan_prefills()
        has_work = len(self._decodes) > 0 or bool(self._chunks)
        if not has_work and (self._late or self._flights):
            return None
        assert has_work, "requests wait and none can run: the pool holds less than one sequence"
        return Plan.of(self._decodes, self._chunks, self._rows)

    def take_admitted(self) -> list[Request]:
        """Requests that got a row in the last schedule()."""
        return [request for request in self._admitted if request.row is not None]

    def request(self, row: int) -> Request:
        """Whose row it is."""
        return self._running.by_row[row]

    def advance(self, plan: Plan) -> None:
        """The plan is on its way: the next is scheduled as if it were done, but for its unknown tokens."""
        rows = self._rows
        dropped, self._dropped_rows = self._dropped_rows, set()
        kept = plan.without(dropped)
        rows.num_computed[kept.rows] = kept.starts + kept.lens
        sampled = kept.rows[kept.samples]
        rows.num_tokens[sampled] += 1
        rows.num_pending[sampled] += 1
        self._cache.commit(self._running.by_row, kept.rows)
        self._flights.launch(plan, dropped)

    def dropped(self, plan: Plan) -> set[int]:
        """Rows whose results do not count when the oldest plan comes back: they have changed hands."""
        return self._flights.dropped() if plan is self._flights.oldest else self._dropped_rows

    def update(self, plan: Plan, token_ids: NDArray[np.int32]) -> list[RequestOutput]:
        """Enter the results of a plan, oldest first. token_ids: [number of True in plan.samples], in order.

        Requests that have ended or lost their rows since schedule() get nothing.
        """
        was_ahead = plan is self._flights.oldest
        if not was_ahead:
            self.advance(plan)
        whole, plan = plan, plan.without(self._flights.land())
        if len(plan.rows) < len(whole.rows):
            token_ids = token_ids[np.isin(whole.rows[whole.samples], plan.rows)]
        rows, now = self._rows, time.monotonic()
        self._counts["generation_tokens"] += len(token_ids)
        sampled = plan.rows[plan.samples]
        rows.token_ids[sampled, rows.num_tokens[sampled] - rows.num_pending[sampled]] = token_ids
        rows.num_pending[sampled] -= 1
        if was_ahead:  # pages whose last token was not known by then
            self._cache.commit(self._running.by_row, plan.rows)
        outputs, by_row = [], self._running.by_row
        for row, token_id in zip(sampled.tolist(), token_ids.tolist(), strict=True):
            request = by_row[row]
            request.num_output += 1
            if request.num_output == 1:
                request.first_token_s = now
                self._counts["prompt_tokens"] += len(request.message.prompt_ids)
            if token_id in request.stop_ids or request.num_output >= request.max_tokens:
                outputs.append(request.newest(token_id))
                if outputs[-1].finish_reason is not None:
                    self._end(request)
            else:  # without a call: this is most of a step's overhead
                outputs.append(
                    RequestOutput(
                        request_id=request.message.request_id,
                        token_ids=[token_id],
                        cached_tokens=request.cached_tokens or 0,
                        scheduled_s=request.scheduled_s,
                        first_token_s=request.first_token_s,
                    )
                )
        return outputs

    def stats(self) -> EngineStats:
        """Gauges and counters; the core adds its own."""
        pool = self._cache.pool
        rows = self._running.rows
        left = self._rows.num_prompt[rows] - self._rows.num_computed[rows]
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            queued_tokens=int(left.clip(min=0).sum()) + self._waiting.num_tokens,
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=pool.num_cached,
            resident_adapters=self.slots.resident,
            waiting_adapters=self.slots.awaited,
            **self._counts,
        )

    def check(self) -> None:
        """Prove that requests, rows and pages agree."""
        assert {r.request_id for r in (*self._waiting, *self._running)} == set(self._requests)
        assert len(self._waiting) + len(self._running) == len(self._requests), "a request is in two places"
        assert all(r.row is None for r in self._waiting)
        self._running.check()
        assert sorted(self._waiting, key=_rank) == list(self._waiting)
        self.slots.check(self._rows.adapter_slots[self._running.rows].tolist())
        self._waiting.check()
        assert self._rows.num_free + len(self._running) == self._rows.max_seqs, "a row is lost"
        self._cache.check(self._running.by_row)

    def _plan_decodes(self) -> None:
        """One token for every running request that has one left to compute, best rank first."""
        rows = self._running.rows
        computed = self._rows.num_computed[rows]
        known = np.minimum(self._rows.num_tokens[rows], self._last_lens[rows] - 1)  # nothing follows the last
        left = known - computed
        if self._late:
            left[np.isin(rows, [request.row for request in self._late if request.row is not None])] = 0
        is_decode = left == 1
        self._decodes, self._prefills = rows[is_decode], rows[left > 1]
        at_border = rows[is_decode & (computed % self._cache.page_tokens == 0)]
        if not len(at_border) or self._cache.extend_each(at_border):
            return
        for request in [self.request(row) for row in at_border.tolist()]:
            if request.row is not None and not self._extend(request, 1):
                self._preempt(request)

    def _plan_prefills(self) -> None:
        budget = self._ration.next_step(len(self._decodes))
        part = budget.part
        self._min_chunk = max(1, min(MIN_CHUNK_TOKENS, budget.left // 2, budget.part // 2))
        by_row = self._running.by_row
        prefills = [by_row[row] for row in self._prefills.tolist() if row in by_row]  # the others lost theirs
        rows = self._running.rows  # whose mask is late, or who lacks one token, is no prefill now
        unfinished = rows[self._rows.num_computed[rows] < self._rows.num_prompt[rows]].tolist()
        self._awaited.begin([*prefills, *(by_row[row] for row in unfinished)])
        self._promised = {
            r.row: self._cache.pages_to_come(r.row, self._max_chunk) for r in prefills if r.row is not None
        }
        may_enter = self._waiting.priorities if self._may_admit() else []
        for priority in sorted({*may_enter, *(r.message.priority for r in prefills)}):
            running = [r for r in prefills if r.message.priority == priority]
            budget.renew(part)
            half = budget.half()
            self._share(self._in_order(running, self._waiting.by_arrival(priority), _rank), half)
            budget.take(half.taken, is_long=half.has_long)
            running += [r for r in self._admitted if r.message.priority == priority]
            by_length = sorted((r for r in running if r.row is not None), key=self._length)
            waiting = self._waiting.by_length(priority)
            self._share(self._in_order(by_length, waiting, self._length), budget)

    def _in_order(
        self, running: list[Request], waiting: list[Request], key: Callable[[Request], tuple[int, int]]
    ) -> Iterable[Request]:
        """Both, each sorted by `key`; those that wait as long as somebody may be admitted."""
        entering = takewhile(self._may_admit, waiting)
        return merge(running, entering, key=key) if running and waiting else running or entering

    def _may_admit(self, _: Request | None = None) -> bool:
        return self._can_admit and self._rows.num_free > 0

    def _share(self, requests: Iterable[Request], budget: Budget) -> None:
        """Give chunks to requests in order."""
        for request in requests:
            if budget.left <= 0:
                break
            if request.row is None and not self._admit(request, budget):
                continue
            row = request.row
            assert row is not None
            planned = self._chunks.get(row, 0)
            remaining = self._remaining(request) - planned
            chunk = min(budget.most(remaining, is_long=request.is_long), MAX_CHUNK_TOKENS - planned)
            if chunk >= max(1, min(remaining, self._min_chunk)) and self._extend(request, planned + chunk):
                self._chunks[row] = planned + chunk
                budget.take(chunk, is_long=request.is_long)
            self._promised[row] = self._cache.pages_to_come(row, self._max_chunk)

    def _admit(self, request: Request, budget: Budget) -> bool:
        """Give a waiting request a row and its prefix hit, if it has work in it now and will find pages."""
        if not self._may_admit() or budget.left < min(len(request.token_ids), self._min_chunk):
            return False
        if not self.slots.may_enter(request.adapter, request.message.priority):
            return False
        hit = self._awaited.hit(request)
        if hit is None:
            return False  # share more when it is there
        tokens = len(request.token_ids) - hit * self._cache.page_tokens
        request.is_long = self._ration.is_long(tokens)
        if budget.most(tokens, is_long=request.is_long) < min(tokens, self._min_chunk):
            return False
        cost = self._cache.admission_cost(request, hit, self._max_chunk) + sum(self._promised.values())
        pool = self._cache.pool
        if self._running and cost + int(WATERMARK * pool.num_pages) > pool.num_free:
            self._can_admit = False  # nobody overtakes it, or many small ones could keep it out for ever
            return False
        self._enter(request, hit)
        self._awaited.expect(request)
        return True

    def _enter(self, request: Request, hit_pages: int) -> None:
        num_prompt = len(request.message.prompt_ids)
        self._waiting.remove(request)
        row = self._rows.take(request.token_ids, num_prompt)
        self._rows.adapter_slots[row] = self.slots.take(request.adapter, request.message.priority)
        self._cache.attach(request, row, hit_pages)
        request.row = row
        self._last_lens[row] = num_prompt + request.max_tokens
        if request.cached_tokens is None:
            request.cached_tokens = min(hit_pages * self._cache.page_tokens, num_prompt)
            request.scheduled_s = time.monotonic()
            self._ration.hear(num_prompt - request.cached_tokens)
            self._counts["prefix_queries"] += num_prompt
            self._counts["prefix_hits"] += request.cached_tokens
        self._running.add(request)
        self._admitted.append(request)

    def _extend(self, request: Request, num_new: int) -> bool:
        """Pages for its next tokens, preempting worse-ranked requests while there are too few."""
        assert request.row is not None
        while not self._cache.extend(request.row, num_new):
            victim = self._running.worst
            if victim is request:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, request: Request) -> None:
        assert request.row is not None
        row = request.row
        request.token_ids = self._rows.known(row).copy()  # the rest will be computed, and chosen, again
        self._chunks.pop(row, None)
        self._decodes = self._decodes[self._decodes != row]
        self._leave(request)
        self._waiting.add(request)
        self._counts["preemptions"] += 1
        self._can_admit = False

    def _end(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request.row is None:
            self._waiting.remove(request)
        else:
            self._leave(request)
        request.adapter = None  # runners keep the last request of a row; its adapter may be unloaded

    def _leave(self, request: Request) -> None:
        """Take its row and pages away. Whoever gets them next is computed after the steps on their way."""
        assert request.row is not None
        self._flights.drop(request.row)
        self._dropped_rows.add(request.row)
        self._cache.free(request.row)
        self.slots.release(int(self._rows.adapter_slots[request.row]))
        self._rows.give_back(request.row)
        self._promised.pop(request.row, None)
        self._running.remove(request)
        request.row = None

    def _remaining(self, request: Request) -> int:
        if request.row is None:
            return len(request.token_ids)
        known = min(self._rows.num_tokens[request.row], self._last_lens[request.row] - 1)
        return max(0, int(known - self._rows.num_computed[request.row]))

    def _length(self, request: Request) -> tuple[int, int]:
        return (self._remaining(request), request.arrival_idx)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
