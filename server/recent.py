"""What came in and how fast it was answered in the last half minute: signals for an autoscaler.

Kept in a ring of slices, so memory does not grow with the load. Prometheus' counters cannot say this: whoever
reads them must remember the reading before.
"""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

SLICE_S = 5.0
NUM_SLICES = 6  # the last one is filling: a window of 25 to 30 s
WAIT_BOUNDS_S = tuple(0.001 * 1.25**i for i in range(64))  # 1 ms to 21 min, a quarter apart


@dataclass(slots=True)
class _Slice:
    start_s: float
    arrived_tokens: int = 0
    prompt_tokens: int = 0  # of requests that got their first token
    cached_tokens: int = 0  # of these
    waits: list[int] = field(default_factory=lambda: [0] * (len(WAIT_BOUNDS_S) + 1))


class Recent:
    """Arrivals, cache hits and times to first token over a sliding window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s = clock()
        self._slices: deque[_Slice] = deque(maxlen=NUM_SLICES)

    def arrived(self, num_tokens: int) -> None:
        """Requests with prompts of that many tokens came in, whether they were let in or not."""
        self._now().arrived_tokens += num_tokens

    def first_token(self, wait_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        """A request got its first token after wait_s; cached_tokens of its prompt were not computed."""
        current = self._now()
        current.prompt_tokens += prompt_tokens
        current.cached_tokens += cached_tokens
        current.waits[bisect_left(WAIT_BOUNDS_S, wait_s)] += 1

    def arrived_tokens_per_s(self) -> float:
        """Prompt tokens to compute that come in per second: prefix hits, at their recent share, are none."""
        now, slices = self._clock(), self._live()
        oldest_s = now - SLICE_S * (NUM_SLICES - 1) - now % SLICE_S
        window_s = max(SLICE_S, now - max(self._started_s, oldest_s))  # a first burst is no rate yet
        prompt, cached = sum(one.prompt_tokens for one in slices), sum(one.cached_tokens for one in slices)
        hit_share = cached / prompt if prompt else 0.0
        return sum(one.arrived_tokens for one in slices) * (1 - hit_share) / window_s

    def first_token_quantile_s(self, quantile: float) -> float:
        """Upper bound of the time to first token of that share of requests; 0 if none got one."""
        counts = [sum(column) for column in zip(*(one.waits for one in self._live()), strict=True)]
        rank, seen = quantile * sum(counts), 0
        for bound, count in zip((*WAIT_BOUNDS_S, WAIT_BOUNDS_S[-1]), counts, strict=False):
            seen += count
            if count and seen >= rank:
                return bound
        return 0.0

    def _now(self) -> _Slice:
        start_s = self._clock() // SLICE_S * SLICE_S
        if not self._slices or self._slices[-1].start_s < start_s:
            self._slices.append(_Slice(start_s))
        return self._slices[-1]

    def _live(self) -> list[_Slice]:
        first_s = (self._clock() // SLICE_S - NUM_SLICES + 1) * SLICE_S
        return [one for one in self._slices if one.start_s >= first_s]
