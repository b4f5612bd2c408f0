"""Which replicas of a node have ended, by the locks of their files. With Ray: test_gateway_on_ray.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from cabochon.server.replica_ports import ended, sign_in

SIGN_IN_AND_WAIT = """
import subprocess, sys
from pathlib import Path
from cabochon.server.replica_ports import sign_in
file = sign_in(Path(sys.argv[1]), "killed")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # an engine
print(child.pid, flush=True)
child.wait()
"""


def test_only_those_whose_process_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "replicas"
    assert list(ended(folder)) == [], "the first one of a node"
    with sign_in(folder, "alive"), sign_in(folder, "closed"):
        assert list(ended(folder)) == []
    with sign_in(folder, "alive"):
        assert list(ended(folder)) == ["closed"]


def test_a_killed_process_has_ended_though_its_child_lives(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SIGN_IN_AND_WAIT, str(tmp_path / "replicas")],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert list(ended(tmp_path / "replicas")) == []
        process.kill()
        process.wait()
        assert list(ended(tmp_path / "replicas")) == ["killed"]
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
