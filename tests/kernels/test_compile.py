"""Every kernel compiled for GPUs that are not here: what the interpreter cannot show.

Triton's compiler runs in a process of its own, since this one has TRITON_INTERPRET set. To have a kernel
compiled, give its file a `compile_specs()` and name the file in MODULES.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cabochon.kernels.ahead_of_time import SHARED_BYTES

MODULES = ["prefill_attention", "decode_attention", "sample", "rms_norm sandwich_norm embed_norm geglu "
           "qkv_rope_write quantize_rows prepare_inputs sampling_state lora"]  # fmt: skip
COMPILE = """
import importlib, json, sys
from cabochon.kernels.ahead_of_time import compile_spec

modules = [importlib.import_module(f"cabochon.kernels.{name}") for name in sys.argv[1].split()]
specs = [spec for module in modules for spec in module.compile_specs()]
if sys.argv[2] == "first":  # of each kernel, for sm_90
    specs = list({spec.kernel.__name__: spec for spec in reversed(specs) if spec.sm == 90}.values())
unique = {(spec.sm, spec.kernel.__name__, repr(spec.constants), repr(spec.types)): spec for spec in specs}
for spec in unique.values():
    print(json.dumps(compile_spec(spec)._asdict()), flush=True)
"""
Compile = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compile_module(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """The compiled specs of modules, "first" of each kernel or "all"."""
    cache_dir = str(tmp_path_factory.mktemp("triton"))

    @functools.cache
    def run(module: str, which: str) -> list[dict[str, Any]]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, module, which],
            env=env | {"TRITON_CACHE_DIR": cache_dir},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def check(compiled: list[dict[str, Any]]) -> None:
    assert compiled
    for result in compiled:
        assert result["shared_bytes"] <= SHARED_BYTES[result["sm"]], result
        assert result["stack_bytes"] == 0, f"spills: {result}"


@pytest.mark.parametrize("module", MODULES)
def test_one_configuration_of_each_kernel_compiles_for_sm_90(module: str, compile_module: Compile) -> None:
    check(compile_module(module, "first"))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_every_configuration_fits_its_gpu_and_spills_nothing(module: str, compile_module: Compile) -> None:
    compiled = compile_module(module, "all")
    assert {result["sm"] for result in compiled} == {80, 89, 90}
    check(compiled)


def test_prefill_on_sm_90_multiplies_with_wgmma_and_copies_asynchronously(compile_module: Compile) -> None:
    (compiled,) = compile_module("prefill_attention", "first")
    assert compiled["has_wgmma"]
    assert compiled["has_async_copy"]
