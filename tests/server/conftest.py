"""Servers over a FakeEngine: `live` is fresh for each test, `shared` for tests that change nothing."""

from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[LiveServer]:
    """The engine answers with the last message, which is the whole prompt; the template knows tools."""
    path = tmp_path / "echo.jinja"
    path.write_text("{% if tools %}{% endif %}{{ messages[-1]['content'] }}")
    with LiveServer(chat_template=str(path)) as server:
        yield server
