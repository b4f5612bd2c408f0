"""What KubeRay makes of a pod template: the `ray start` line, and a "pod" with a network of its own.

The rules are those of ray-operator/controllers/ray/common/pod.go at feeaf72: setMissingRayStartParams,
generateRayStartCommand, convertParamMap.
"""

import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from tools import absent, need_program

UNITS = {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}
HEAD_IP, WORKER_IP = "10.77.0.1", "10.77.0.2"
READ_ONLY = "mount --bind /tmp /tmp && mount -o remount,bind,ro / && ! touch /read-only 2>/dev/null && "


def amount(quantity: str) -> int:
    """Of cores or bytes, rounded up, as resource.Quantity.Value() does."""
    number = quantity.rstrip("mMGi")
    return -int(-float(number) * UNITS[quantity[len(number) :]] // 1)


def ray_start(parameters: dict[str, str], limits: dict[str, str], head_address: str | None) -> str:
    """head_address: for a worker."""
    given = dict(parameters)
    if head_address is None:
        given.setdefault("dashboard-host", "0.0.0.0")
    else:
        given.setdefault("address", head_address)
    given.setdefault("metrics-export-port", "8080")
    given["block"] = "true"
    given.setdefault("dashboard-agent-listen-port", "52365")
    given.setdefault("num-cpus", str(amount(limits["cpu"])))
    given.setdefault("memory", str(amount(limits["memory"])))
    if "nvidia.com/gpu" in limits:
        given.setdefault("num-gpus", limits["nvidia.com/gpu"])
    flags = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(given.items())]
    return " ".join(["ray start", *(["--head"] if head_address is None else []), *flags])


class PodNetwork:
    """Two network namespaces that see each other and nothing else. They end with the context."""

    def __enter__(self) -> "PodNetwork":
        self._ip = need_program("ip")
        self._folder = tempfile.TemporaryDirectory(prefix="pods", dir="/tmp")
        suffix = Path(self._folder.name).name[-8:]
        self.head, self.worker = f"head-{suffix}", f"worker-{suffix}"
        self.first_processes: list[psutil.Popen] = []  # PID 1 of each pod
        if self._do("netns", "add", self.head, check=False) != 0:
            self._folder.cleanup()
            absent("network namespaces need the right to make them: run as root")
        self._do("netns", "add", self.worker)
        ends = ("h" + suffix, "w" + suffix)
        self._do("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip((self.head, self.worker), ends, (HEAD_IP, WORKER_IP), strict=True):
            self._do("link", "set", end, "netns", name)
            self._do("-n", name, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                self._do("-n", name, "link", "set", device, "up")
            self._do("-n", name, "route", "add", "default", "dev", end)  # Ray finds its address by it
        return self

    def __exit__(self, *_: object) -> None:
        processes = list(self.first_processes)
        for process in self.first_processes:
            with suppress(psutil.NoSuchProcess):
                processes += process.children(recursive=True)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 10)
        for name in (self.head, self.worker):
            self._do("netns", "delete", name, check=False)
        self._folder.cleanup()

    def start(self, pod: str, line: str, env: dict[str, str]) -> None:
        """A shell line in a pod, whose root file system is read-only but for /tmp. Output goes to `log`."""
        with (Path(self._folder.name) / "log").open("a") as log:
            command = [self._ip, "netns", "exec", pod, "/bin/bash", "-c", "--", READ_ONLY + line]
            self.first_processes.append(psutil.Popen(command, env=env, stdout=log, stderr=log))

    def ask(self, pod: str, *curl: str) -> str:
        """What a request from a pod is answered, status line first; empty if it is not."""
        command = [self._ip, "netns", "exec", pod, "curl", "--silent", "--include", "--max-time", "60", *curl]
        run = subprocess.run(command, capture_output=True, text=True)
        return run.stdout

    @property
    def log(self) -> str:
        return (Path(self._folder.name) / "log").read_text(errors="replace")

    @property
    def folder(self) -> Path:
        """For what pods write; a short path."""
        return Path(self._folder.name)

    def _do(self, *arguments: str, check: bool = True) -> Any:
        return subprocess.run([self._ip, *arguments], check=check, capture_output=True).returncode
