"""What direct ingress relies on and Ray does not document: this file fails on the day that Ray changes it.

No cluster; test_ray_serve.py has what only one can show.
"""

import asyncio
import errno
import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from ray.serve._private import constants, http_util
from ray.serve._private.common import RequestProtocol
from ray.serve._private.controller import ServeController
from ray.serve._private.node_port_manager import NoAvailablePortError, NodePortManager, PortAllocator
from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD, Replica
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema
from starlette.middleware import Middleware

from cabochon.server.deployment import NAME, CabochonReplica, app_builder
from cabochon.server.fast_path import DRAINING, SERVE_HEALTH, FastPath
from cabochon.server.ingress import CALLBACK, bind_at_once
from cabochon.server.settings import load_arguments


def constants_after(code: str) -> dict[str, Any]:
    """What Ray has read from an environment that `code` has changed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CABOCHON_"))}
    read = """
import json
from ray.serve._private import constants
print(json.dumps({n: v for n, v in vars(constants).items() if n.startswith("RAY_SERVE_") and
                  isinstance(v, bool | int | float | str | None)}))
"""
    command = [sys.executable, "-c", code + read]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    values: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return values


def test_ray_is_the_version_that_was_read() -> None:
    assert version("ray") == "2.60.0"


def test_without_our_environment_there_is_no_direct_ingress() -> None:
    values = constants_after("")
    assert values["RAY_SERVE_ENABLE_DIRECT_INGRESS"] is False
    assert values["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == 30000
    assert values["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] == 31000
    assert values["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == 30
    assert values["RAY_SERVE_PORT_QUARANTINE_S"] == 150
    assert values["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] is True
    assert values["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] is None


def test_our_environment_passes_our_check() -> None:
    values = constants_after("""
from cabochon.server.settings import load_arguments, set_ray_environment
settings = load_arguments({"port": 9000, "replicas_per_node": 2, "lame_duck_s": 7})
set_ray_environment(settings)
from cabochon.server.ingress import check_direct_ingress
check_direct_ingress(settings)
""")
    assert values["RAY_SERVE_ENABLE_DIRECT_INGRESS"] is True
    assert values["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == 9000
    assert values["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] == 9002
    assert values["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == 7
    assert values["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == CALLBACK
    assert values["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] is False


def blocks_of_the_guide() -> tuple[dict[str, str], dict[str, Any]]:
    """The environment, and the config of Serve."""
    text = (Path(__file__).parents[2] / "docs/ray-serve.md").read_text()
    env, config = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    return {variable["name"]: variable["value"] for variable in env["env"]}, config


def test_the_environment_of_the_guide_passes_our_check_with_its_arguments() -> None:
    env, config = blocks_of_the_guide()
    (application,) = ServeDeploySchema.model_validate(config).applications
    constants_after(f"""
import os
os.environ.update({env})
from cabochon.server.ingress import check_direct_ingress
from cabochon.server.settings import load_arguments, set_ray_environment
settings = load_arguments({application.args})
before = dict(os.environ)
set_ray_environment(settings)
assert {{name for name in os.environ.keys() - before if name.startswith("RAY_")}} == set(), "one is missing"
check_direct_ingress(settings)
""")
    assert application.import_path == f"{app_builder.__module__}:{app_builder.__name__}"
    assert [deployment.name for deployment in application.deployments] == [NAME]
    server = load_arguments(application.args).server
    assert float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) > server.lame_duck_s + server.drain_timeout_s


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> PortAllocator:
    """Of one node, with two ports."""
    monkeypatch.setattr("ray.serve._private.node_port_manager.RAY_SERVE_PORT_QUARANTINE_S", 0)
    return PortAllocator(8000, 8002, protocol=RequestProtocol.HTTP, node_id="node")


def test_ports_are_handed_out_from_the_lowest_and_the_end_is_exclusive(allocator: PortAllocator) -> None:
    assert [allocator.allocate(name) for name in "ab"] == [8000, 8001]
    with pytest.raises(NoAvailablePortError):
        allocator.allocate("c")


def test_a_port_is_offered_again_at_once_without_quarantine(allocator: PortAllocator) -> None:
    assert [allocator.allocate(name) for name in "ab"] == [8000, 8001]
    allocator.prune({"b"})
    assert allocator.allocate("c") == 8000


def test_a_port_that_could_not_be_bound_is_never_offered_again(allocator: PortAllocator) -> None:
    allocator.release("a", allocator.allocate("a"), block_port=True)
    assert allocator.allocate("b") == 8001
    with pytest.raises(NoAvailablePortError):
        allocator.allocate("c")


def test_serve_loses_the_port_of_a_replica_between_two_looks_until_we_give_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails at the first `raises`, Ray has mended it: server/replica_ports.py may go."""
    prefix = "ray.serve._private.node_port_manager.RAY_SERVE_"
    monkeypatch.setattr(f"{prefix}PORT_QUARANTINE_S", 0)
    monkeypatch.setattr(f"{prefix}DIRECT_INGRESS_MIN_HTTP_PORT", 8000)
    monkeypatch.setattr(f"{prefix}DIRECT_INGRESS_MAX_HTTP_PORT", 8002)
    monkeypatch.setattr(NodePortManager, "_node_managers", {})
    node = NodePortManager.get_node_manager("node")
    assert node.allocate_port("old", RequestProtocol.HTTP) == 8000
    NodePortManager.prune({"node": {"old"}})
    assert node.allocate_port("starting", RequestProtocol.HTTP) == 8001
    NodePortManager.prune({"node": {"old"}})  # that replica came and went since the last look
    with pytest.raises(NoAvailablePortError):
        node.allocate_port("next", RequestProtocol.HTTP)
    with pytest.raises(AssertionError, match="port mismatch"):
        node.release_port("starting", 8000, RequestProtocol.HTTP)
    node.release_port("starting", 8001, RequestProtocol.HTTP)
    with pytest.raises(ValueError, match="not allocated"):
        node.release_port("starting", 8001, RequestProtocol.HTTP)
    assert node.allocate_port("next", RequestProtocol.HTTP) == 8001
    assert list(signature(ServeController.release_replica_port).parameters)[1:5] == [
        *("node_id", "replica_id", "port", "protocol")
    ]


@pytest.mark.parametrize(
    ("is_stopping", "is_healthy", "expected"),
    [
        (False, True, (True, "success")),
        (False, False, (False, "UNHEALTHY")),
        (True, True, (False, DRAINING.decode())),
        (True, False, (False, DRAINING.decode())),
    ],
)
def test_a_replicas_health_says_that_it_drains(
    is_stopping: bool, is_healthy: bool, expected: tuple[bool, str]
) -> None:
    state = SimpleNamespace(_shutting_down=is_stopping, _healthy=is_healthy)
    assert asyncio.run(Replica._dataplane_health_check(state)) == expected


def test_a_replicas_port_is_open_before_its_first_check_and_serve_waits_for_that() -> None:
    done: list[str] = []

    def noted(name: str, value: Any = None) -> Any:
        async def call() -> Any:
            done.append(name)
            return value

        return call

    state = SimpleNamespace(
        _user_callable_initialized_lock=asyncio.Lock(),
        _user_callable_initialized=False,
        _user_callable_wrapper=SimpleNamespace(
            initialize_callable=noted("constructor"),
            start_user_loop_watchdog=lambda _: None,
            has_user_replica_metadata_method=False,
            call_record_autoscaling_stats=None,
        ),
        _event_loop=None,
        _on_initialized=noted("port"),
        _metrics_manager=SimpleNamespace(enable_custom_autoscaling_metrics=lambda **_: None),
        check_health=noted("first check"),
    )
    asyncio.run(Replica.initialize(state, None, None))
    assert done == ["constructor", "port", "first check"]


def test_serve_builds_the_app_with_our_method_after_the_constructor() -> None:
    assert hasattr(CabochonReplica, SERVE_BUILD_ASGI_APP_METHOD)


def test_the_controller_tells_its_http_options() -> None:
    assert callable(ServeController.get_http_config)
    assert constants.SERVE_CONTROLLER_NAME
    assert constants.SERVE_NAMESPACE
    defaults = HTTPOptions()
    assert (defaults.host, defaults.port, defaults.keep_alive_timeout_s) == ("127.0.0.1", 8000, 90)


def test_the_callback_wraps_servers_outermost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of Serve's own middleware: it answers before anything else, and sees the last headers."""
    monkeypatch.setattr(http_util, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK)
    options = http_util.configure_http_middlewares(HTTPOptions())
    assert [middleware.cls for middleware in options.middlewares] == [FastPath]

    class Outer:
        def __init__(self, app: Any) -> None:
            self.inner = app

    app = http_util._apply_middlewares(lambda *_: None, [Middleware(Outer)])
    assert isinstance(app, Outer)
    assert isinstance(app.inner, http_util.RequestIdMiddleware)


@pytest.fixture
def left_behind() -> int:
    """A port on which a server has closed a connection first: the kernel keeps it for a minute."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.accept()[0].close()
            assert client.recv(1) == b""
    return port


async def ask_serves_server(port: int) -> str:
    """Start Serve's HTTP server around an app, and ask it once."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for message in http_util.convert_object_to_asgi_messages("success", status_code=200):
            await send(message)

    loop = asyncio.get_running_loop()
    options = HTTPOptions(host="127.0.0.1", port=port)
    task, server = await http_util.start_asgi_http_server(app, options, event_loop=loop)
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://127.0.0.1:{port}{SERVE_HEALTH}")).text
    finally:
        server.should_exit = True
        await task


def test_serve_binds_a_port_with_connections_left_only_with_our_mend(
    monkeypatch: pytest.MonkeyPatch, left_behind: int
) -> None:
    monkeypatch.setattr(http_util, "socket", socket)  # it is put back at the end
    with pytest.raises(RuntimeError, match="Failed to bind") as taken:
        asyncio.run(ask_serves_server(left_behind))
    taken.traceback[-1].locals["sock"].close()  # Serve does not
    assert isinstance(taken.value.__cause__, OSError)
    assert taken.value.__cause__.errno == errno.EADDRINUSE
    bind_at_once()
    assert asyncio.run(ask_serves_server(left_behind)) == "success"
