"""The requests that have a row, by rank: who is served first and preempted last."""

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.request import Request


class Running:
    """Iterates in order of rank."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._by_row: dict[int, Request] = {}
        self._rows: NDArray[np.intp] = np.empty(0, np.intp)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def worst(self) -> Request:
        """Whoever is preempted first. There must be one."""
        return self._requests[-1]

    @property
    def by_row(self) -> dict[int, Request]:
        """Whose row is which. Not to be changed."""
        return self._by_row

    @property
    def rows(self) -> NDArray[np.intp]:
        """The rows in order of rank, [len], as numpy indexes fastest. Not to be changed."""
        return self._rows

    def add(self, request: Request) -> None:
        """It has its row."""
        assert request.row is not None
        index = bisect_left(self._requests, request.rank, key=_rank)
        self._requests.insert(index, request)
        self._by_row[request.row] = request
        row = np.array([request.row], np.intp)
        self._rows = np.concatenate([self._rows[:index], row, self._rows[index:]])

    def remove(self, request: Request) -> None:
        """It has its row still."""
        assert request.row is not None
        index = bisect_left(self._requests, request.rank, key=_rank)
        assert self._requests[index] is request, "it has no row"
        del self._requests[index], self._by_row[request.row]
        self._rows = np.concatenate([self._rows[:index], self._rows[index + 1 :]])

    def check(self) -> None:
        """Prove that the books agree."""
        assert {request.row: request for request in self._requests} == self._by_row
        assert sorted(self._requests, key=_rank) == self._requests
        assert self.rows.tolist() == [request.row for request in self._requests]


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
