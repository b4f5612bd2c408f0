"""This replica's share of the project's calls a minute, as a bucket. Replicas share nothing else."""

import time
from collections.abc import Callable

from cabochon.server.armor.verdicts import Stage

BURST = 1 / 10  # of a minute's share may be spent at once; the rest comes evenly
RESERVE = 1 / 4  # of the bucket is kept for prompts


class Quota:
    """At most `per_min / num_replicas` calls in any minute: the bucket plus what flows into it meanwhile."""

    def __init__(
        self, per_min: int, num_replicas: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        share = per_min / num_replicas
        self._capacity = max(1.0, share * BURST)
        self._per_s = (share - self._capacity if share >= 2 else min(share, 1.0)) / 60
        self._reserve = self._capacity * RESERVE if self._capacity >= 2 else 0.0
        self._clock = clock
        self._left = self._capacity
        self._seen_s = clock()

    def take(self, stage: Stage) -> bool:
        """Whether a call may be made; then it is counted. Answers leave a reserve to prompts."""
        if self.available() - 1 < (self._reserve if stage == "response" else 0.0):
            return False
        self._left -= 1
        return True

    def refused(self) -> None:
        """The service itself said that the quota is used up, by others too: begin anew from nothing."""
        self.available()
        self._left = 0.0

    def available(self) -> float:
        """Calls that may be made at once."""
        now = self._clock()
        self._left = min(self._capacity, self._left + (now - self._seen_s) * self._per_s)
        self._seen_s = now
        return self._left

    def pressure(self) -> float:
        """0 while the bucket is full, 1 when it is empty: larger windows of answers need fewer calls."""
        return 1 - self.available() / self._capacity
