"""How many replicas Ray Serve should run, from what their engines say.

`autoscaling_stats` is what a replica reports. `desired_replicas` is the decision, which knows no Ray;
`policy`, and `Policy`, which takes goals, are its form for Ray 2.60's `autoscaling_config.policy`. Delays
are ours: set Serve's `upscale_delay_s` and `downscale_delay_s` to 0. Serve pickles the policy by value, so
what it uses of this file must not refer to the server.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median_low
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cabochon.engine.errors import ConfigError

if TYPE_CHECKING:
    from cabochon.server.service import Service

TTFT_QUANTILE = 0.9
# What a trend is read from. On six ramps and six noises in tests/replica_pool.py 120 s is too late for half
# of the ramps, and 60 s flaps under noise
TREND_S, TREND_POINT_S, TREND_MIN_POINTS = 90.0, 10.0, 8
TREND_LAG_S = 15.0  # arrivals are a mean over half a minute
MAX_GROWTH = 2.0  # a trend is believed up to twice the present demand
RATE_HALF_LIFE_S = 600.0
NUM_PEAKS = 10  # slots of the quiet time
MAX_DEMAND = 1e6  # replicas; a rate of next to nothing makes no infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What one replica reports; its field names are the names of Serve's custom metrics."""

    queued_tokens: float  # prompt tokens not computed yet
    predicted_wait_s: float  # queued_tokens over prefill_tokens_per_s: what admission goes by
    arrived_tokens_per_s: float  # prompt tokens to compute that came in, of refused requests too
    prefill_tokens_per_s: float  # measured, 0 before the first measurement
    kv_usage: float  # pages of live requests over all pages, 0..1
    running: float
    waiting: float
    max_running: float  # rows of the batch, at least 1
    ttft_s: float  # 0.9 quantile of the last half minute, 0 if nobody got a first token


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """What the policy aims at. Raises ConfigError on a value out of range."""

    slo_s: float = 2.0  # time to first token that was promised
    start_up_s: float = 120.0  # from a decision to a ready replica; larger looks further ahead
    quiet_s: float = 300.0  # replicas go when nothing needed them for so long; larger costs idle time
    high: float = 0.8  # share of the pool in use above which it grows
    low: float = 0.6  # what the pool left after shrinking would have in use, at most
    stale_s: float = 60.0  # older reports say nothing; one comes every 10 s, and clocks of nodes differ

    def __post_init__(self) -> None:
        for name in ("slo_s", "start_up_s", "quiet_s", "stale_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)}: raise it")
        if not 0 < self.low < self.high <= 1:
            raise ConfigError(
                f"low and high must satisfy 0 < low < high ≤ 1, got {self.low} and {self.high}:"
                " leave a gap, or the pool flaps"
            )


class Pool(NamedTuple):
    """The replicas that are wanted now, loading ones included, and their bounds (inclusive)."""

    target: int
    min_replicas: int
    max_replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is kept from one decision to the next: a dozen points and a dozen peaks, at most."""

    since_s: float  # first decision of an unbroken row
    last_s: float
    rate: float = 0.0  # prompt tokens per second of a replica that is kept busy
    trend: tuple[tuple[float, float], ...] = ()  # (time, demand)
    peaks: tuple[tuple[float, int], ...] = ()  # (start of slot, replicas needed)


def autoscaling_stats(service: "Service") -> dict[str, float]:
    """The fields of ReplicaLoad, from the last snapshot: for a deployment's record_autoscaling_stats."""
    stats, recent = service.engine.stats(), service.metrics.recent
    return {
        "queued_tokens": float(service.lifecycle.queued_tokens()),
        "predicted_wait_s": service.lifecycle.predicted_wait_s(),
        "arrived_tokens_per_s": recent.arrived_tokens_per_s(),
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "kv_usage": stats.kv_usage,
        "running": float(stats.running),
        "waiting": float(stats.waiting),
        "max_running": float(service.engine.info.max_seqs),
        "ttft_s": recent.first_token_quantile_s(TTFT_QUANTILE),
    }


def desired_replicas(
    loads: Sequence[ReplicaLoad | None], pool: Pool, memory: Memory | None, now: float, goals: Goals
) -> tuple[int, Memory]:
    """Replicas to run, in [min_replicas, max_replicas], and the memory for the next call.

    loads: one for each running replica, None where nothing fresh is known: such a one is taken to be idle,
    but holds the pool at its size. now: seconds of one clock. More load never gives fewer replicas.

    Demand is in replicas that would be full: the largest of rows, KV memory, and prompt tokens per second
    over the measured rate, where the queue counts as more arrivals, spread over a start-up time. The pool
    grows at once when demand, a start-up ahead on its trend, exceeds `high`, or when most replicas are late.
    It shrinks to the largest need of the last `quiet_s`, reckoned at `low`.
    """
    memory = _continued(memory, now, goals)
    known = [load for load in loads if load is not None]
    is_late = _is_late(known, goals)
    rate = _rate(known, memory, now, is_late=is_late)
    demand = _demand(known, rate, goals.start_up_s)
    growth = _growth((*memory.trend, (now, demand)))
    ahead = min(demand + growth * (goals.start_up_s + TREND_LAG_S), MAX_GROWTH * demand)
    grow_to = max(_ceil(ahead / goals.high), len(loads) + 1 if is_late else 0)
    keep = max(_ceil(ahead / goals.low), grow_to, pool.target if len(known) < len(loads) or not known else 0)
    trend = memory.trend
    if known and (not trend or now - trend[-1][0] >= TREND_POINT_S):
        trend = (*(point for point in trend if now - point[0] < TREND_S), (now, demand))
    peaks = _with_peak(memory.peaks, now, keep, goals.quiet_s)
    if now - memory.since_s < goals.quiet_s:
        shrink_to = pool.target
    else:
        shrink_to = min(pool.target, max(need for _, need in peaks))
    least = min(max(1, pool.min_replicas), pool.max_replicas)  # at 0 nobody would be there to report
    wanted = min(max(grow_to, shrink_to, least), pool.max_replicas)
    return wanted, Memory(since_s=memory.since_s, last_s=now, rate=rate, trend=trend, peaks=peaks)


def _continued(memory: Memory | None, now: float, goals: Goals) -> Memory:
    """A new one after a break: what was not seen may have been a peak."""
    if memory is None or not 0 <= now - memory.last_s <= goals.quiet_s / NUM_PEAKS:
        return Memory(since_s=now, last_s=now, rate=0.0 if memory is None else memory.rate)
    return memory


def _is_late(known: Sequence[ReplicaLoad], goals: Goals) -> bool:
    """Of most replicas: one hot replica is the router's to relieve."""
    if not known:
        return False
    wait_s = median_low([load.predicted_wait_s for load in known])
    ttft_s = median_low([load.ttft_s for load in known])  # where the prediction was wrong
    return wait_s > goals.slo_s / 2 or (ttft_s > goals.slo_s and any(load.waiting for load in known))


def _rate(known: Sequence[ReplicaLoad], memory: Memory, now: float, *, is_late: bool) -> float:
    """A replica at ease measures less than it can do, its steps are not full: the best rate is kept."""
    measured = [load.prefill_tokens_per_s for load in known if load.prefill_tokens_per_s > 0]
    remembered = memory.rate * 0.5 ** ((now - memory.last_s) / RATE_HALF_LIFE_S)
    if not measured:
        return memory.rate
    return fmean(measured) if is_late else max(fmean(measured), remembered)


def _demand(known: Sequence[ReplicaLoad], rate: float, drain_s: float) -> float:
    """drain_s: in which the queue should go, on top of what arrives."""
    if not known:
        return 0.0
    # A queue stays where it is: only one that most replicas have is a lack of replicas
    queued_tokens = len(known) * median_low([load.queued_tokens for load in known])
    rows = sum(load.running / load.max_running for load in known)
    kv = sum(load.kv_usage for load in known)
    tokens_per_s = sum(load.arrived_tokens_per_s for load in known) + queued_tokens / drain_s
    return min(max(rows, kv, tokens_per_s / rate if rate else 0.0), MAX_DEMAND)


def _growth(points: Sequence[tuple[float, float]]) -> float:
    """Demand per second that three quarters of all pairs of points exceed: noise has none."""
    if len(points) < TREND_MIN_POINTS:
        return 0.0
    slopes = sorted(
        (b - a) / (b_s - a_s)
        for i, (a_s, a) in enumerate(points)
        for b_s, b in points[i + 1 :]
        if b_s - a_s >= TREND_POINT_S / 2  # the newest point may be close to the one before
    )
    return max(0.0, slopes[len(slopes) // 4])


def _with_peak(
    peaks: tuple[tuple[float, int], ...], now: float, need: int, quiet_s: float
) -> tuple[tuple[float, int], ...]:
    slot_s = quiet_s / NUM_PEAKS
    peaks = tuple(peak for peak in peaks if now - peak[0] < quiet_s + slot_s)
    if peaks and now - peaks[-1][0] < slot_s:
        return (*peaks[:-1], (peaks[-1][0], max(peaks[-1][1], need)))
    return (*peaks, (now, need))


def _ceil(replicas: float) -> int:
    return math.ceil(replicas - 1e-9)


class Context(Protocol):
    """What is used of ray.serve.config.AutoscalingContext."""

    running_replicas: Any  # list[ReplicaID]
    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    policy_state: dict[str, Any]
    current_time: float | None

    @property
    def raw_metrics(self) -> Any:
        """Metric name → ReplicaID → list of TimeStampedValue, oldest first."""


class Policy:
    """For `policy_function: cabochon.server.autoscaling:Policy` with `policy_kwargs`, the fields of Goals."""

    def __init__(self, **goals: float) -> None:
        self._goals = Goals(**goals)

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Replicas to run, and the state that Serve hands back at the next call."""
        now = context.current_time or 0.0
        metrics = context.raw_metrics or {}
        loads = [_load(metrics, replica, now - self._goals.stale_s) for replica in context.running_replicas]
        pool = Pool(
            context.target_num_replicas,
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
        )
        memory = context.policy_state.get("memory")
        wanted, memory = desired_replicas(loads, pool, memory, now, self._goals)
        return wanted, {"memory": memory}


def policy(context: Context) -> tuple[int, dict[str, Any]]:
    """For `policy_function: cabochon.server.autoscaling:policy`, with default goals."""
    return Policy()(context)


def _load(metrics: Mapping[str, Any], replica: Any, oldest_s: float) -> ReplicaLoad | None:
    """The newest report of a replica; None if it is stale, incomplete or not finite."""
    values = {}
    for field in fields(ReplicaLoad):
        series = metrics.get(field.name, {}).get(replica)
        if not series or series[-1].timestamp < oldest_s or not 0 <= series[-1].value < math.inf:
            return None
        values[field.name] = float(series[-1].value)
    return ReplicaLoad(**values) if values["max_running"] >= 1 else None
