"""The requests that have no row, in the two orders in which they are served: by arrival and by length.

A request does not change while it waits, so both orders are kept instead of sorted anew each step: a queue of
a thousand costs a step nothing. Knows nothing of rows or pages.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from cabochon.engine.adapters.slots import LoadedAdapter
from cabochon.engine.request import Request

Key = TypeVar("Key", int, tuple[int, int])
Order = dict[int, list[Request]]  # by priority; no list is empty


class WaitingQueue:
    """Iterates in order of rank."""

    def __init__(self) -> None:
        self.num_tokens = 0  # known tokens of all of them
        self.adapters: dict[LoadedAdapter, Counter[int]] = {}  # requests of each by priority; no 0
        self._by_arrival: Order = {}
        self._by_length: Order = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_arrival.values()))

    def __iter__(self) -> Iterator[Request]:
        for priority in self.priorities:
            yield from self._by_arrival[priority]

    @property
    def priorities(self) -> list[int]:
        """The priorities that somebody waits with, best first."""
        return sorted(self._by_arrival)

    def by_arrival(self, priority: int) -> list[Request]:
        """A copy, oldest first."""
        return list(self._by_arrival.get(priority, ()))

    def by_length(self, priority: int) -> list[Request]:
        """A copy, shortest first."""
        return list(self._by_length.get(priority, ()))

    def add(self, request: Request) -> None:
        """Its token_ids must not change until it is removed."""
        priority = request.message.priority
        insort(self._by_arrival.setdefault(priority, []), request, key=_arrival)
        insort(self._by_length.setdefault(priority, []), request, key=_length)
        self.num_tokens += len(request.token_ids)
        if request.adapter is not None:
            self.adapters.setdefault(request.adapter, Counter())[priority] += 1

    def remove(self, request: Request) -> None:
        """It must be there."""
        _remove(self._by_arrival, request, _arrival)
        _remove(self._by_length, request, _length)
        self.num_tokens -= len(request.token_ids)
        if request.adapter is not None:
            left = self.adapters[request.adapter]
            left[request.message.priority] -= 1
            if not left[request.message.priority]:
                del left[request.message.priority]
            if not left:
                del self.adapters[request.adapter]

    def check(self) -> None:
        """Prove that both orders hold the same requests, each sorted."""
        assert self._by_arrival.keys() == self._by_length.keys()
        for priority, requests in self._by_arrival.items():
            assert requests, "an empty list is kept"
            assert requests == sorted(self._by_length[priority], key=_arrival)
            assert self._by_length[priority] == sorted(requests, key=_length)
        assert self.num_tokens == sum(len(request.token_ids) for request in self)
        pairs = Counter((request.adapter, request.message.priority) for request in self if request.adapter)
        assert pairs == Counter({(a, p): n for a, of_a in self.adapters.items() for p, n in of_a.items()})


def _arrival(request: Request) -> int:
    return request.arrival_idx


def _length(request: Request) -> tuple[int, int]:
    return (len(request.token_ids), request.arrival_idx)


def _remove(order: Order, request: Request, key: Callable[[Request], Key]) -> None:
    requests = order[request.message.priority]
    idx = bisect_left(requests, key(request), key=key)
    assert requests[idx] is request, "not in the queue"
    del requests[idx]
    if not requests:
        del order[request.message.priority]
