"""A real Ray Serve application grows and shrinks by the policy, from what its replicas report."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import fake_service, wait_until
from tools import need_package

from cabochon.server.autoscaling import autoscaling_stats

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own, of files and sockets that it leaves open
]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serve on a Ray of this test alone."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings(action="ignore"):
        need_package("ray.serve")
        import ray
        from ray import serve
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        yield serve
    finally:
        serve.shutdown()
        ray.shutdown()


def test_serve_grows_a_busy_pool_and_shrinks_an_idle_one(serve: Any, tmp_path: Path) -> None:
    idle = autoscaling_stats(fake_service())
    busy_file = tmp_path / "busy"
    busy_file.touch()

    @serve.deployment(
        ray_actor_options={"num_cpus": 0},
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 3,
            "metrics_interval_s": 1,
            "look_back_period_s": 3,
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "policy": {
                "policy_function": "cabochon.server.autoscaling:Policy",
                "policy_kwargs": {"quiet_s": 5},
            },
        },
    )
    class Replica:
        def record_autoscaling_stats(self) -> dict[str, float]:
            return {**idle, "kv_usage": 0.9 if busy_file.exists() else 0.0}

    serve.run(Replica.bind())

    def num_running() -> int:
        deployment = serve.status().applications["default"].deployments["Replica"]
        return int(deployment.replica_states.get("RUNNING", 0))

    wait_until(lambda: num_running() == 3, 60)  # 0.9 of one is more than one, of two more than two
    busy_file.unlink()
    since_s = time.monotonic()
    wait_until(lambda: num_running() == 1, 60)
    assert time.monotonic() - since_s >= 5
