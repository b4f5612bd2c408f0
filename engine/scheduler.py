"""Chooses what each step computes, under one token budget.

A request has `num_computed` chasing `num_tokens`; prefill, its chunks, prefix hits and decode are the same thing
with other distances. Running decodes come first. Of the rest, within a priority, half goes to requests in order
of arrival, so that the oldest always advances, and half to the shortest remaining first, so that a short prompt
never waits behind a long one. When pages run out the worst-ranked running request is preempted: it is computed
again later, mostly from its own cached pages. Knows nothing of tensors.
"""

import time
from bisect import insort
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.admission import check_request
from cabochon.engine.errors import RequestError
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.messages import EngineStats, GenerateRequest, RequestOutput
from cabochon.engine.plan import Plan
from cabochon.engine.request import Request
from cabochon.engine.rows import Rows

MAX_CHUNK_TOKENS = (
    2048  # a sliding group holds window + chunk: longer chunks would undo what the window saves
)
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
        eos_token_ids: Iterable[int],
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self._rows = rows
        self._cache = cache
        self._step_tokens = step_tokens
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # by rank
        self._running: list[Request] = []  # by rank
        self._by_row: dict[int, Request] = {}
        self._admitted: list[Request] = []
        self._work: dict[int, int] = {}  # row -> tokens of the step being planned
        self._num_arrivals = 0
        self._can_admit = True  # until the step finds that somebody waits for pages
        self._min_chunk = MIN_CHUNK_TOKENS
        self._counts = dict.fromkeys(
            ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions"), 0
        )

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, message: GenerateRequest) -> None:
        """Accept a request. Raises RequestError, and then nothing has changed."""
        if message.request_id in self._requests:
            raise RequestError(
                f"request ids must be unique, {message.request_id} is running: send another id"
            )
        max_tokens = check_request(message, max_model_len=self._max_model_len, vocab_size=self._vocab_size)
        params = message.params
        request = Request(
            message=message,
            arrival_idx=self._num_arrivals,
            max_tokens=max_tokens,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            token_ids=list(message.prompt_ids),
            is_published=not message.is_private,
        )
        self._num_arrivals += 1
        self._requests[message.request_id] = request
        insort(self._waiting, request, key=_rank)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its pages. Unknown ids are ignored: it may have ended."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        if request.row is None:
            self._waiting.remove(request)
        else:
            self._leave(request)

    def publish(self, request_id: str) -> None:
        """Let others share the pages of a private request. Unknown ids are ignored: it may have ended."""
        request = self._requests.get(request_id)
        if request is not None:
            self._cache.publish(request)

    def schedule(self) -> Plan | None:
        """The next step, its pages taken; None if there is nothing to do."""
        self._work.clear()
        self._admitted.clear()
        self._can_admit = True
        if not self._requests:
            return None
        self._plan_decodes()
        num_decodes = len(self._work)
        if self._waiting or num_decodes < len(self._running):
            self._plan_prefills()
        assert self._work, "requests wait and none can run: the pool holds less than one sequence"
        return self._plan()

    def take_admitted(self) -> list[Request]:
        """Requests that got a row in the last schedule()."""
        return [request for request in self._admitted if request.row is not None]

    def request_id(self, row: int) -> str:
        """Whose row it is."""
        return self._by_row[row].request_id

    def update(self, plan: Plan, token_ids: NDArray[np.int32]) -> list[RequestOutput]:
        """Enter the results of a plan. token_ids: [number of True in plan.samples], in order."""
        rows, now = self._rows, time.monotonic()
        after = plan.starts + plan.lens
        rows.num_computed[plan.rows] = after
        self._commit(plan, after)
        prompt_tokens = np.minimum(after, rows.num_prompt[plan.rows]) - plan.starts
        self._counts["prompt_tokens"] += int(prompt_tokens.clip(min=0).sum())
        self._counts["generation_tokens"] += len(token_ids)
        sampled = plan.rows[plan.samples]
        rows.token_ids[sampled, rows.num_tokens[sampled]] = token_ids
        rows.num_tokens[sampled] += 1
        return [
            self._append(self._by_row[row], token_id, now)
            for row, token_id in zip(sampled.tolist(), token_ids.tolist(), strict=True)
        ]

    def stats(self) -> EngineStats:
        """Gauges and counters; the core adds its own."""
        pool = self._cache.pool
        rows = [request.row for request in self._running]
        left = self._rows.num_prompt[rows] - self._rows.num_computed[rows] if rows else np.zeros(1, np.int32)
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            queued_tokens=int(left.clip(min=0).sum()) + sum(len(r.token_ids) for r in self._waiting),
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=pool.num_cached,
            **self._counts,
        )

    def check(self) -> None:
        """Prove that requests, rows and pages agree."""
        assert {r.request_id for r in (*self._waiting, *self._running)} == set(self._requests)
        assert len(self._waiting) + len(self._running) == len(self._requests), "a request is in two places"
        assert all(r.row is None for r in self._waiting)
        assert {r.row: r for r in self._running} == self._by_row
        assert sorted(self._running, key=_rank) == self._running
        assert sorted(self._waiting, key=_rank) == self._waiting
        assert self._rows.num_free + len(self._running) == self._rows.max_seqs, "a row is lost"
        self._cache.check(self._by_row)

    # Planning

    def _plan_decodes(self) -> None:
        """One token for every running request that has one left to compute, best rank first."""
        rows = np.fromiter((request.row or 0 for request in self._running), np.int32, len(self._running))
        computed = self._rows.num_computed[rows]
        is_decode = self._rows.num_tokens[rows] - computed == 1
        needs_page = is_decode & (computed % self._cache.page_tokens == 0)
        self._work.update(dict.fromkeys(rows[is_decode].tolist(), 1))
        for request in [self._running[i] for i in np.flatnonzero(needs_page)]:
            if request.row is not None and not self._extend(request, 1):
                self._preempt(request)

    def _plan_prefills(self) -> None:
        left = self._step_tokens - len(self._work)
        prefills = [r for r in self._running if r.row not in self._work]
        computing = set(self._names_to_come(prefills)) if self._waiting else set()
        self._min_chunk = max(1, min(MIN_CHUNK_TOKENS, left // 2))
        candidates = sorted([*prefills, *self._waiting], key=_rank)
        for _, members in groupby(candidates, key=lambda request: request.message.priority):
            by_arrival = list(members)
            half = left // 2
            left -= half - self._share(by_arrival, half, computing)
            by_length = sorted(by_arrival, key=lambda r: (self._remaining(r), r.arrival_idx))
            left = self._share(by_length, left, computing)

    def _share(self, requests: list[Request], budget: int, computing: set[bytes]) -> int:
        """Give chunks to requests in order. Returns what is left of the budget."""
        for request in requests:
            if budget <= 0:
                break
            if request.row is None and not self._admit(request, computing):
                continue
            row = request.row
            assert row is not None
            planned = self._work.get(row, 0)
            remaining = self._remaining(request) - planned
            chunk = min(remaining, budget, MAX_CHUNK_TOKENS - planned)
            if chunk < max(1, min(remaining, self._min_chunk)):
                continue
            if self._extend(request, planned + chunk):
                self._work[row] = planned + chunk
                budget -= chunk
        return budget

    def _admit(self, request: Request, computing: set[bytes]) -> bool:
        """Give a waiting request a row and its prefix hit, if its known tokens will find pages."""
        if not self._can_admit or not self._rows.num_free:
            return False
        hit = self._cache.lookup(request)
        names = self._cache.page_names(request, len(request.token_ids) // self._cache.page_tokens)
        if hit < len(names) and names[hit] in computing:
            return False  # somebody better ranked computes its next page right now: share it next step
        chunk = min(self._step_tokens, MAX_CHUNK_TOKENS)
        cost = self._cache.admission_cost(request, hit, chunk)
        promised = sum(self._cache.pages_to_come(r, chunk) for r in self._running if self._remaining(r) > 1)
        pool = self._cache.pool
        if self._running and cost + promised + int(WATERMARK * pool.num_pages) > pool.num_free:
            self._can_admit = False  # nobody overtakes it, or many small ones could keep it out for ever
            return False
        self._enter(request, hit)
        if request.is_published:
            computing.update(names[hit:])
        return True

    def _enter(self, request: Request, hit_pages: int) -> None:
        num_prompt = len(request.message.prompt_ids)
        row = self._rows.take(request.token_ids, num_prompt)
        self._cache.attach(request, row, hit_pages)
        request.row = row
        if request.cached_tokens is None:
            request.cached_tokens = min(hit_pages * self._cache.page_tokens, num_prompt)
            request.scheduled_s = time.monotonic()
            self._counts["prefix_queries"] += num_prompt
            self._counts["prefix_hits"] += request.cached_tokens
        self._waiting.remove(request)
        insort(self._running, request, key=_rank)
        self._by_row[row] = request
        self._admitted.append(request)

    def _extend(self, request: Request, num_new: int) -> bool:
        """Pages for its next tokens, preempting worse-ranked requests while there are too few."""
        assert request.row is not None
        while not self._cache.extend(request.row, num_new):
            victim = self._running[-1]
            if victim is request:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, request: Request) -> None:
        assert request.row is not None
        row = request.row
        request.token_ids = self._rows.token_ids[row, : self._rows.num_tokens[row]].tolist()
        self._work.pop(row, None)
        self._leave(request)
        insort(self._waiting, request, key=_rank)
        self._counts["preemptions"] += 1
        self._can_admit = False

    def _leave(self, request: Request) -> None:
        """Take its row and pages away."""
        assert request.row is not None
        self._cache.free(request.row)
        self._rows.give_back(request.row)
        del self._by_row[request.row]
        self._running.remove(request)
        request.row = None

    def _names_to_come(self, prefills: Iterable[Request]) -> Iterator[bytes]:
        """Names of the pages that running prefills will fill: waiting requests need not compute them too."""
        P = self._cache.page_tokens
        for request in prefills:
            if request.is_published:
                done = int(self._rows.num_computed[request.row]) // P
                yield from self._cache.page_names(request, int(self._rows.num_tokens[request.row]) // P)[
                    done:
                ]

    def _remaining(self, request: Request) -> int:
        if request.row is None:
            return len(request.token_ids)
        return int(self._rows.num_tokens[request.row] - self._rows.num_computed[request.row])

    def _plan(self) -> Plan:
        rows = np.fromiter(self._work.keys(), np.int32, len(self._work))
        lens = np.fromiter(self._work.values(), np.int32, len(self._work))
        starts = self._rows.num_computed[rows]
        samples = starts + lens == self._rows.num_tokens[rows]
        is_decode = samples & (lens == 1)
        order = np.argsort(~is_decode, kind="stable")
        return Plan(rows[order], starts[order], lens[order], samples[order], int(is_decode.sum()))

    # Results

    def _commit(self, plan: Plan, after: NDArray[np.int32]) -> None:
        changed = self._cache.needs_commit(plan.starts, after)
        for row in plan.rows[changed].tolist():
            self._cache.commit(self._by_row[row], row)

    def _append(self, request: Request, token_id: int, now: float) -> RequestOutput:
        request.num_output += 1
        if request.num_output == 1:
            request.first_token_s = now
        is_stop = token_id in request.stop_ids and request.num_output > request.message.params.min_tokens
        is_last = is_stop or request.num_output >= request.max_tokens
        if is_last:
            del self._requests[request.request_id]
            self._leave(request)
        return RequestOutput(
            request_id=request.request_id,
            token_ids=[token_id],
            finish_reason=("stop" if is_stop else "length") if is_last else None,
            stop_token_id=token_id if is_stop else None,
            cached_tokens=request.cached_tokens or 0,
            scheduled_s=request.scheduled_s,
            first_token_s=request.first_token_s,
        )


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
