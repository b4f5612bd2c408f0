"""The steps that are on the device, oldest first, and the rows of each whose results count no more."""

from collections import deque

from cabochon.engine.plan import Plan


class Flights:
    """A row that changes hands is dropped from all of them: what comes next in it is another's."""

    def __init__(self) -> None:
        self._flights: deque[tuple[Plan, set[int]]] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def oldest(self) -> Plan | None:
        return self._flights[0][0] if self._flights else None

    def launch(self, plan: Plan, dropped_rows: set[int]) -> None:
        self._flights.append((plan, dropped_rows))

    def drop(self, row: int) -> None:
        """Its request has ended or lost its row."""
        for _, dropped in self._flights:
            dropped.add(row)

    def dropped(self) -> set[int]:
        """Rows of the oldest step whose results do not count."""
        return self._flights[0][1]

    def land(self) -> set[int]:
        """The oldest step is back. Returns its dropped rows."""
        return self._flights.popleft()[1]
