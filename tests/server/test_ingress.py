"""The self-check of a replica's environment, and the application that Serve gets. No cluster."""

from typing import Any

import pytest
from ray import serve
from ray.serve._private import constants

from cabochon.engine.errors import ConfigError
from cabochon.server import ingress
from cabochon.server.deployment import app_builder
from cabochon.server.fast_path import middlewares
from cabochon.server.ingress import CALLBACK, check_direct_ingress, check_http
from cabochon.server.settings import Settings, load_arguments

RIGHT: dict[str, Any] = {
    "ENABLE_DIRECT_INGRESS": True,
    "DIRECT_INGRESS_MIN_HTTP_PORT": 8000,
    "DIRECT_INGRESS_MAX_HTTP_PORT": 8001,
    "DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": 30.0,
    "PORT_QUARANTINE_S": 0.0,
    "HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
}


def set_ray(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """What Ray has read from the environment when it was imported."""
    for name, value in {**RIGHT, **values}.items():
        monkeypatch.setattr(constants, f"RAY_SERVE_{name}", value)


def settings(**args: Any) -> Settings:
    return load_arguments({"lame_duck_s": 30, **args})


def test_the_callback_is_ours() -> None:
    module, _, name = CALLBACK.rpartition(".")
    assert f"{middlewares.__module__}.{middlewares.__name__}" == f"{module}.{name}"


def test_an_environment_that_is_right_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ray(monkeypatch)
    check_direct_ingress(settings())
    set_ray(monkeypatch, DIRECT_INGRESS_MAX_HTTP_PORT=8008)
    check_direct_ingress(settings(replicas_per_node=8))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ENABLE_DIRECT_INGRESS", False, r"must be 1 \(a port of its own for each replica\), it is 0"),
        ("DIRECT_INGRESS_MIN_HTTP_PORT", 30000, r"must be 8000 \(the option port\), it is 30000"),
        ("DIRECT_INGRESS_MAX_HTTP_PORT", 8002, r"must be 8001 \(exclusive: .*\), it is 8002"),
        ("DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", 5.0, r"must be 30 or more \(lame_duck_s.*\), it is 5.0"),
        ("PORT_QUARANTINE_S", 150.0, r"must be 0 \(else a new replica finds no port.*\), it is 150.0"),
        ("HTTP_PROXY_CALLBACK_IMPORT_PATH", None, r"must be cabochon.server.fast_path.middlewares .* None"),
    ],
)
def test_an_environment_that_is_wrong_is_said_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    set_ray(monkeypatch, **{name: value})
    mend = "set it in the environment of every Ray node, head and workers"
    with pytest.raises(ConfigError, match=f"RAY_SERVE_{name} {message}: {mend}"):
        check_direct_ingress(settings())
    with pytest.raises(ConfigError, match=name):
        app_builder({"lame_duck_s": "30"})


class _Controller:
    """Stands in for Serve's controller: its HTTP options."""

    def __init__(self, **options: Any) -> None:
        self._options = serve.HTTPOptions(**{"port": 8100, "host": "127.0.0.1", **options})
        self.get_http_config = self

    def remote(self) -> serve.HTTPOptions:
        return self._options


def set_cluster(monkeypatch: pytest.MonkeyPatch, num_nodes: int, **options: Any) -> None:
    monkeypatch.setattr(ingress.ray, "get_actor", lambda *_, **__: _Controller(**options))
    monkeypatch.setattr(ingress.ray, "get", lambda reference: reference)
    nodes = [{"Alive": True}] * num_nodes + [{"Alive": False}]
    monkeypatch.setattr(ingress.ray, "nodes", lambda: nodes)


def test_a_host_that_other_nodes_cannot_reach_is_wrong_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ray(monkeypatch)
    set_cluster(monkeypatch, 1)
    check_http(settings())
    set_cluster(monkeypatch, 2, host="0.0.0.0")
    check_http(settings())
    set_cluster(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"host must be reachable .*, it is 127.0.0.1: set it to 0.0.0.0"):
        check_http(settings())


def test_serves_proxy_must_not_take_a_replicas_port(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ray(monkeypatch)
    set_cluster(monkeypatch, 1, port=8000)
    with pytest.raises(ConfigError, match=r"port must be outside .* 8000 to 8000, it is 8000: .* 8100"):
        check_http(settings())


def test_what_costs_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    set_ray(monkeypatch, RUN_USER_CODE_IN_SEPARATE_THREAD=False)
    set_cluster(monkeypatch, 1, keep_alive_timeout_s=620)
    check_http(settings())
    assert not caplog.records
    set_cluster(monkeypatch, 1, keep_alive_timeout_s=90)
    check_http(settings())
    assert "keep_alive_timeout_s=90 is less than load balancers keep connections" in caplog.text
    set_ray(monkeypatch, RUN_USER_CODE_IN_SEPARATE_THREAD=True)
    check_http(settings())
    assert "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=1 makes each token cross threads" in caplog.text


def test_the_application_has_our_options_typed_from_words(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ray(monkeypatch)
    words = {
        "model": "demo",
        "max_seqs": "8",
        "num_replicas": "2",
        "drain_timeout_s": "40",
        "lame_duck_s": "30",
    }
    deployment = app_builder(words)._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("cabochon", 2)
    assert deployment.ray_actor_options == {"num_cpus": 1, "num_gpus": 0}
    assert deployment.max_queued_requests == -1
    assert deployment.max_ongoing_requests >= 10**6
    config = deployment._deployment_config
    assert deployment._replica_config.max_replicas_per_node == 1
    assert config.graceful_shutdown_timeout_s == 75
    assert config.health_check_period_s <= 2
    _, given = deployment.init_args
    assert (given.engine.max_seqs, given.server.lame_duck_s) == (8, 30)


@pytest.mark.parametrize(
    ("args", "num_gpus", "num_cpus"),
    [
        ({"device": "cuda"}, 1, 1),
        ({"num_cpus": 0.5}, 0, 0.5),
        ({"device": "cuda", "num_gpus": "0.5"}, 0.5, 1),
    ],
)
def test_a_replica_reserves_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], num_gpus: float, num_cpus: float
) -> None:
    set_ray(monkeypatch)
    reserved = app_builder(args)._bound_deployment.ray_actor_options
    assert reserved == {"num_cpus": num_cpus, "num_gpus": num_gpus}
