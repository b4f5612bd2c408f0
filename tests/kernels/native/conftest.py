"""Each library that was built and that this CPU can run, not only the one that `auto` takes."""

import ctypes
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from tools import absent

from cabochon.kernels.native import library

LEVELS = ("DEFAULT", "AVX2", "AVX512")  # torch's names; each has the instructions of those before it
NEEDS = {"_any": "DEFAULT", "_v3": "AVX2", "_v4": "AVX512", "_v4_vnni": "AVX512"}


@pytest.fixture(params=NEEDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All that asks for the library gets that of the parameter."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in LEVELS or LEVELS.index(capability) < LEVELS.index(NEEDS[request.param]):
        pytest.skip(f"a CPU with {capability} does not run {request.param}")
    if request.param == "_v4_vnni" and not torch.cpu._is_vnni_supported():
        pytest.skip("a CPU without VNNI does not run it")
    path = Path(library.__file__).with_name(request.param + EXTENSION_SUFFIXES[0])
    if not path.exists():
        absent("no C library: it is built by pip install, with a C compiler")
    loaded = ctypes.CDLL(str(path))
    monkeypatch.setattr(library, "library", lambda: loaded)
    library.function.cache_clear()
    yield request.param
    library.function.cache_clear()
