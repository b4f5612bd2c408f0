"""gateway-check, as a command, on a real server with adapters: everything passes, its end too."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_maker import make_adapter
from real_server import RealServer

from cabochon.engine.models.hf_config import load_model_config

pytestmark = pytest.mark.slow

TIMES = {
    "load.latency",
    "load.fresh",
    "client.disconnect",
}  # a busy machine may spoil them, not make them fail
LAME_DUCK_S = 7.0


@pytest.fixture
def server(long_gemma2_dir: Path, tmp_path: Path) -> Iterator[RealServer]:
    make_adapter(tmp_path / "red", load_model_config(long_gemma2_dir), 8, seed=1, std=0.1)
    options = {"dtype": "fp32", "kv_cache_gib": 0.05, "served_model_name": "tiny", "max_loras": 2}
    adapters = {"lora_modules": f"red={tmp_path}/red", "lora_dir": str(tmp_path)}
    with RealServer(long_gemma2_dir, lame_duck_s=LAME_DUCK_S, **options, **adapters) as real:
        yield real


def test_a_real_server_passes_every_check_and_ends_in_order(server: RealServer) -> None:
    command = [sys.executable, "-m", "cabochon.server.cli", "gateway-check", server.url]
    flags = ["--seconds=3", f"--drain-pid={server.process.pid}", "--json"]
    run = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    (report,) = json.loads(run.stdout)["servers"]
    rows = {row["check"]: row for row in report["findings"]}
    assert {name: row for name, row in rows.items() if row["result"] != "pass" and name not in TIMES} == {}
    assert {"lora.active", "lora.routes", "drain.stream", "drain.lame_duck"} <= set(rows)
    assert report["model"] == "tiny"
    assert report["seconds"] < 60
    assert server.exit_code() == 0
