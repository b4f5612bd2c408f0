"""What is wrong with the guard is found before weights are loaded, and leaves no engine behind."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from fake_server import fake_service
from scripted_checker import TEMPLATE

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError
from cabochon.server import deployment, serve
from cabochon.server.armor import connections, start
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.config import ServerConfig
from cabochon.server.service import Service
from cabochon.server.settings import Settings

Replica: Any = (
    deployment.CabochonReplica
)  # its methods on a plain object: collecting one calls an async __del__
SET_UP = ("set_process_environment", "set_up_logging", "check_same_environment", "check_http", "bind_at_once")


def settings(**armor: Any) -> Settings:
    return Settings(
        ServerConfig(), EngineConfig(), armor=ArmorConfig(**{"armor_prompt_template": TEMPLATE, **armor})
    )


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """What a start gets instead of loading: its engine, its prompts."""
    made = fake_service()

    async def engine(*_: object) -> Any:
        return made.engine

    async def model(_: object) -> Path:
        return Path("/nonexistent")

    monkeypatch.setattr(serve, "start_engine", engine)
    monkeypatch.setattr(serve, "find_model", model)
    monkeypatch.setattr(serve, "load_prompts", lambda *_: made.prompts)
    return made


def test_a_wrong_policy_file_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text("keys: []")
    with pytest.raises(ConfigError, match="must have an entry for a key"):
        serve.check_files(settings(armor_policy_file=str(path)))
    serve.check_files(settings())
    serve.check_files(settings(armor_prompt_template=None, armor_policy_file=None))


@pytest.mark.parametrize("error", [None, ModuleNotFoundError("google.cloud")])
def test_a_missing_package_is_found_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def find(_name: str) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(connections, "find_spec", find)
    with pytest.raises(ConfigError, match=r"pip install 'cabochon\[armor\]'"):
        serve.check_files(settings())


def test_a_guard_that_cannot_start_leaves_no_engine(
    monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    async def fails(*_: object) -> None:
        raise ConfigError("the guard")

    monkeypatch.setattr(start, "start_guard", fails)
    with pytest.raises(ConfigError, match="the guard"):
        asyncio.run(serve.start_service(settings()))
    assert service.engine.dead_reason() is not None


def test_on_ray_a_guard_with_a_problem_is_an_error_of_the_start(
    monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    """`cabochon serve` is not ready instead: a replica of Serve is healthy once it has started."""

    async def problem(made: Service, _: object) -> None:
        made.lifecycle.problem = lambda: "the template must be there"

    monkeypatch.setattr(start, "start_guard", problem)
    for name in SET_UP:
        monkeypatch.setattr(deployment, name, lambda *_: None)
    monkeypatch.setattr(deployment, "take_over_ports", AsyncMock())

    async def scenario() -> None:
        with pytest.raises(ConfigError, match="the template must be there"):
            await Replica.__init__(SimpleNamespace(), {}, settings())
        assert service.engine.dead_reason() is not None

    asyncio.run(scenario())


def test_a_replica_that_ends_before_its_watcher_shuts_its_engine_down(service: Service) -> None:
    async def scenario() -> None:
        await Replica.__del__(SimpleNamespace(_service=service))

    asyncio.run(scenario())
    assert service.engine.dead_reason() is not None
