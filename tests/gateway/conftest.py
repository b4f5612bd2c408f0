"""Real servers for a gateway: tiny models in fp32, two rows each so that a third request waits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway import OPTIONS, PROBE_INTERVAL_S, Gateway, started
from real_server import RealServer
from tools import need_gateway_tools


@pytest.fixture(scope="module")
def three(long_gemma2_dir: Path) -> Iterator[list[RealServer]]:
    """Servers that outlive every test of a file."""
    need_gateway_tools()
    servers = [RealServer(long_gemma2_dir, **OPTIONS) for _ in range(3)]
    with started(servers):
        yield servers


@pytest.fixture
def mortal(long_gemma2_dir: Path) -> Iterator[RealServer]:
    """A fourth, for a test to end."""
    need_gateway_tools()
    with RealServer(long_gemma2_dir, **OPTIONS) as server:
        yield server


@pytest.fixture
def gateway(three: list[RealServer]) -> Iterator[Gateway]:
    """Its pool are the three; a saturated pool holds requests for three seconds."""
    urls = [server.url for server in three]
    with Gateway(*urls, probe_interval_s=PROBE_INTERVAL_S, queue_ttl_s=3) as one:
        yield one
