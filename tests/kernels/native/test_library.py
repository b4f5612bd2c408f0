"""Which library is taken, and its threads: callers of all kinds, and forks."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from guarded import noise
from tools import absent
from torch import Tensor

from cabochon.kernels.native.layers import rms_norm
from cabochon.kernels.native.library import library

FORKED = """
import os, torch
from cabochon.kernels.native.layers import rms_norm
torch.set_num_threads(3)
x, weight = torch.randn(300, 640), torch.ones(640)
def normed():
    out = torch.empty_like(x)
    rms_norm(x, weight, 1e-6, out=out)
    return out.numpy().tobytes()  # torch's own operators may not run in a fork
before = normed()
child = os.fork()
if not child:
    os._exit(0 if normed() == before else 1)
assert os.waitpid(child, 0)[1] == 0
assert normed() == before
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """library() looks again, before and after."""
    library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.cache_clear()


@pytest.mark.parametrize("capability", ["DEFAULT", "ZVECTOR"])
def test_an_x86_cpu_without_avx2_has_none(asked: pytest.MonkeyPatch, capability: str) -> None:
    asked.setattr("platform.machine", lambda: "x86_64")
    asked.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert library() is None


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize(
    ("machine", "capability", "name"),
    [
        ("x86_64", "AVX512", "_v4_vnni"),
        ("x86_64", "AVX512", "_v4"),
        ("x86_64", "AVX2", "_v3"),
        ("aarch64", "DEFAULT", "_any"),
    ],
)
def test_each_cpu_has_its_own(
    asked: pytest.MonkeyPatch, machine: str, capability: str, name: str, build: str
) -> None:
    if build != name:
        pytest.skip("another parameter has it: this one may not run here")
    asked.setattr("platform.machine", lambda: machine)
    asked.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    asked.setattr(torch.cpu, "_is_vnni_supported", lambda: name.endswith("vnni"))
    found = library()
    assert found is not None
    assert f"/{name}." in found._name


@pytest.mark.usefixtures("build")
def test_a_level_that_was_not_built_leaves_the_one_below(asked: pytest.MonkeyPatch, build: str) -> None:
    if build != "_v3":
        pytest.skip("another parameter has it: this one may not run here")
    exists = Path.exists
    asked.setattr("platform.machine", lambda: "x86_64")
    asked.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    asked.setattr(Path, "exists", lambda path: "_v4" not in path.name and exists(path))
    found = library()
    assert found is not None
    assert "/_v3." in found._name


def test_without_a_build_there_is_none(asked: pytest.MonkeyPatch) -> None:
    asked.setattr("pathlib.Path.exists", lambda _: False)
    assert library() is None


def normed(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    rms_norm(x, torch.ones(x.shape[1]), 1e-6, out=out)
    return out


@pytest.mark.usefixtures("build")
def test_callers_of_many_threads_do_not_disturb_each_other() -> None:
    """Each caller has a team of its own."""
    threads = torch.get_num_threads()
    inputs = [noise(300, 640, seed=i) for i in range(8)]
    try:
        torch.set_num_threads(3)
        expected = [normed(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(40):
                for got, wanted in zip(pool.map(normed, inputs), expected, strict=True):
                    assert torch.equal(got, wanted)
    finally:
        torch.set_num_threads(threads)


def test_a_fork_works_alone() -> None:
    if library() is None:
        absent("no C library for this CPU: it is built by pip install, with a C compiler")
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)
