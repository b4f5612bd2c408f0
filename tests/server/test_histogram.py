"""Ours against prometheus_client's."""

import hypothesis.strategies as st
from hypothesis import given
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Peer

from cabochon.server.histogram import Histogram

BOUNDS = (0.001, 0.5, 1, 2.5, 1000)


@given(st.lists(st.sampled_from([0.0, 0.001, 0.0011, 0.5, 1, 2, 1000, 1001, 1e9])))
def test_it_renders_as_prometheus_client_does(values: list[float]) -> None:
    registry = CollectorRegistry()
    peer = Peer("a:b", "some text", ["model_name"], buckets=BOUNDS, registry=registry).labels('x"\\\n')
    ours = Histogram("a:b", "some text", BOUNDS, 'x"\\\n')
    for value in values:
        peer.observe(value)
        ours.observe(value)
    assert numbers(ours.render()) == numbers(generate_latest(registry).decode())


def numbers(text: str) -> list[tuple[str, float] | str]:
    """Lines with the value as a number: 3 and 3.0 are one."""
    lines = [line for line in text.splitlines() if "_created" not in line]
    return [
        line if line[0] == "#" else (line.rpartition(" ")[0], float(line.rpartition(" ")[2]))
        for line in lines
    ]
