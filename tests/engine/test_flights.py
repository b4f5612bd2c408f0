"""Steps on their way: a row that changes hands is dropped from all of them, from later ones not."""

import numpy as np

from cabochon.engine.flights import Flights
from cabochon.engine.plan import Plan


def plan(*rows: int) -> Plan:
    ones = np.ones(len(rows), np.int32)
    return Plan(np.array(rows, np.int32), ones, ones, ones > 0, len(rows))


def test_a_row_is_dropped_from_every_step_that_was_launched_before() -> None:
    flights = Flights()
    first, second, third = plan(0, 1), plan(0, 1), plan(1)
    flights.launch(first, {0})
    flights.launch(second, set())
    flights.drop(1)
    flights.launch(third, set())
    assert flights.oldest is first
    assert flights.dropped() == {0, 1}
    assert [flights.land(), flights.land(), flights.land()] == [{0, 1}, {1}, set()]
    assert flights.oldest is None
    assert not flights


def test_a_plan_without_some_rows_keeps_order_and_decodes_first() -> None:
    mixed = Plan(
        np.array([4, 2, 7], np.int32),
        np.array([9, 5, 0], np.int32),
        np.array([1, 1, 6], np.int32),
        np.array([True, True, False]),
        num_decodes=2,
    )
    left = mixed.without({4})
    assert left.rows.tolist() == [2, 7]
    assert left.lens.tolist() == [1, 6]
    assert left.samples.tolist() == [True, False]
    assert left.num_decodes == 1
    assert mixed.without(set()) is mixed
