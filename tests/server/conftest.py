"""Servers over a FakeEngine: `live` is fresh for each test, `shared` for tests that change nothing."""

from collections.abc import Iterator

import pytest
from fake_server import LiveServer


@pytest.fixture
def live() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server


@pytest.fixture(scope="session")
def shared() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server
