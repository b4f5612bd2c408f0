"""A pool of replicas that take a while to start, driven by arrivals, for policies of autoscaling.

One replica computes PREFILL_TOKENS_PER_S of prompts, first come first served, and DECODE_TOKENS_PER_S of each
running request: about a 9B model on an L4, assumed, not measured. Requests go where the queue is shortest, as
the endpoint picker's do. What a replica reports is made by server/recent.py, on the simulation's clock.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from arrival_traces import STEP_S, Arrivals

from cabochon.server.recent import Recent

PREFILL_TOKENS_PER_S = 4000.0
DECODE_TOKENS_PER_S = 20.0
MAX_RUNNING = 64
KV_TOKENS = 60_000
TICK_S = 0.5
REPORT_S = 10.0  # Serve's interval
LOOK_BACK_S = 30.0  # and what its own policy averages over

Decide = Callable[[Any], tuple[float, dict[str, Any]]]


@dataclass(slots=True)
class Request:
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    left: float  # prompt tokens to compute
    end_s: float = math.inf


class Replica:
    """A queue, a batch, and the reports of both."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.ready_s = math.inf
        self.queue: deque[Request] = deque()
        self.batch: list[Request] = []
        self.recent = Recent(clock)
        self.reports: deque[tuple[float, dict[str, float]]] = deque(maxlen=2)
        self.is_silent = False  # sends no more reports
        self._clock = clock
        self._has_worked = False

    @property
    def num_open(self) -> int:
        return len(self.queue) + len(self.batch)

    @property
    def queued_tokens(self) -> float:
        return sum(request.left for request in self.queue)

    def add(self, request: Request) -> None:
        self.recent.arrived(request.prompt_tokens)
        self.queue.append(request)

    def work(self, waits_s: list[float]) -> None:
        """One tick; times to first token are added to waits_s."""
        now, budget = self._clock(), PREFILL_TOKENS_PER_S * TICK_S
        self.batch = [request for request in self.batch if request.end_s > now]
        while self.queue and budget > 0 and len(self.batch) < MAX_RUNNING:
            request = self.queue[0]
            done = min(budget, request.left)
            budget, request.left, self._has_worked = budget - done, request.left - done, True
            if request.left > 0:
                break
            self.queue.popleft()
            waits_s.append(now - request.arrival_s)
            self.recent.first_token(now - request.arrival_s, request.prompt_tokens, 0)
            request.end_s = now + request.output_tokens / DECODE_TOKENS_PER_S
            self.batch.append(request)

    def report(self) -> None:
        if self.is_silent:
            return
        rate = PREFILL_TOKENS_PER_S if self._has_worked else 0.0
        kv_tokens = sum(request.prompt_tokens + request.output_tokens for request in self.batch)
        stats = {
            "queued_tokens": self.queued_tokens,
            "predicted_wait_s": self.queued_tokens / rate if rate else 0.0,
            "arrived_tokens_per_s": self.recent.arrived_tokens_per_s(),
            "prefill_tokens_per_s": rate,
            "kv_usage": min(1.0, kv_tokens / KV_TOKENS),
            "running": float(len(self.batch)),
            "waiting": float(len(self.queue)),
            "max_running": float(MAX_RUNNING),
            "ttft_s": self.recent.first_token_quantile_s(0.9),
        }
        self.reports.append((self._clock(), stats))


@dataclass
class Run:
    """What came of a trace."""

    targets: list[int] = field(default_factory=list)  # one a tick
    ready: list[int] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)  # times to first token
    worst_wait_s: list[float] = field(default_factory=list)  # one a tick: of the replicas' predicted waits

    @property
    def direction_changes(self) -> int:
        """How often growth follows shrinking or the other way round."""
        steps = [b - a for a, b in pairwise(self.targets) if a != b]
        return sum((a > 0) != (b > 0) for a, b in pairwise(steps))

    def late_share(self, slo_s: float) -> float:
        """Of first tokens, those later than slo_s."""
        return sum(wait_s > slo_s for wait_s in self.waits_s) / len(self.waits_s)

    @property
    def replica_hours(self) -> float:
        return sum(self.targets) * TICK_S / 3600


class ReplicaPool:
    """Plays a trace under a policy."""

    def __init__(
        self,
        decide: Decide,
        *,
        start: int = 1,
        bounds: tuple[int, int] = (1, 16),
        start_up_s: float = 120.0,
        make_context: Callable[..., Any] = SimpleNamespace,
    ) -> None:
        """make_context: takes the fields of Ray's AutoscalingContext. start: replicas that are ready."""
        self.now = 0.0
        self.target = start
        self.on_tick: Callable[[ReplicaPool], None] = lambda pool: None
        self.hot_share = 0.0  # of requests, sent to the first replica whatever its queue
        self._decide, self._make_context = decide, make_context
        self._bounds, self._start_up_s = bounds, start_up_s
        self._state: dict[str, Any] = {}
        self._num_made = self._num_sent = 0
        self._open: deque[int] = deque(maxlen=round(LOOK_BACK_S / TICK_S))
        self.replicas: list[Replica] = []
        self._draining: list[Replica] = []
        self._resize()
        for replica in self.replicas:
            replica.ready_s = 0.0

    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.ready_s <= self.now]

    def play(self, trace: Sequence[Arrivals]) -> Run:
        run = Run()
        ticks_per_step = round(STEP_S / TICK_S)
        for arrivals in trace:
            for tick in range(ticks_per_step):
                self.now = arrivals.second + tick * TICK_S
                sent = [arrivals.requests * (tick + i) // ticks_per_step for i in range(2)]
                self._tick(arrivals, sent[1] - sent[0], run)
        return run

    def _tick(self, arrivals: Arrivals, num_new: int, run: Run) -> None:
        self.on_tick(self)
        for _ in range(num_new):
            self._send(
                Request(self.now, arrivals.prompt_tokens, arrivals.output_tokens, arrivals.prompt_tokens)
            )
        for replica in (*self.ready(), *self._draining):
            replica.work(run.waits_s)
        self._draining = [replica for replica in self._draining if replica.num_open]
        for replica in self.ready():
            if not replica.reports or self.now - replica.reports[-1][0] >= REPORT_S:
                replica.report()
        self._open.append(sum(replica.num_open for replica in self.ready()))
        wanted, self._state = self._decide(self._context())
        self.target = max(self._bounds[0], min(self._bounds[1], math.ceil(wanted)))
        self._resize()
        run.targets.append(self.target)
        run.ready.append(len(self.ready()))
        run.worst_wait_s.append(max(one.queued_tokens for one in self.ready()) / PREFILL_TOKENS_PER_S)

    def _send(self, request: Request) -> None:
        ready = self.ready()
        self._num_sent += 1
        is_hot = self._num_sent * self.hot_share // 1 > (self._num_sent - 1) * self.hot_share // 1
        (ready[0] if is_hot else min(ready, key=lambda one: (one.queued_tokens, one.num_open))).add(request)

    def _resize(self) -> None:
        while len(self.replicas) < self.target:
            self._num_made += 1
            replica = Replica(f"replica-{self._num_made}", lambda: self.now)
            replica.ready_s = self.now + self._start_up_s
            self.replicas.append(replica)
        while len(self.replicas) > self.target:
            newest = max(self.replicas, key=lambda one: one.ready_s)
            self.replicas.remove(newest)
            self._draining += [newest] if newest.ready_s <= self.now else []

    def _context(self) -> Any:
        running = [replica.name for replica in self.ready()]
        metrics: dict[str, dict[str, Any]] = {}
        for replica in self.ready():
            for sent_s, report in replica.reports:
                for name, value in report.items():
                    point = SimpleNamespace(timestamp=sent_s, value=value)
                    metrics.setdefault(name, {}).setdefault(replica.name, []).append(point)
        return self._make_context(
            running_replicas=running,
            current_num_replicas=len(running),
            target_num_replicas=self.target,
            total_num_requests=sum(self._open) / len(self._open),
            raw_metrics=metrics,
            capacity_adjusted_min_replicas=self._bounds[0],
            capacity_adjusted_max_replicas=self._bounds[1],
            policy_state=dict(self._state),
            current_time=self.now,
        )
