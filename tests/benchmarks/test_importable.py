"""Cabochon without installation: torch, transformers, tokenizers, safetensors and pytest are enough."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import importable
import pytest

# What the project depends on and a GPU machine need not have
LACKING = ("ray", "fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "msgspec", "llguidance",
           "gguf", "prometheus_client", "openai", "schemathesis", "selenium", "jsonschema")  # fmt: skip
BLOCK = f"""
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Lacking())
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f)]  # our own installation
"""


def run(code: str, folder: Path, wheels: Path) -> str:
    env = importable.environment(folder, wheels)
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code], env=env, capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_all_programs_import_from_links_alone(tmp_path: Path) -> None:
    code = """
import importlib, json, pathlib, cabochon.engine.load, cabochon.kernels
names = sorted(path.stem for path in pathlib.Path(%r).glob("*.py"))
for name in names:
    importlib.import_module(name)
output = cabochon.engine.messages.RequestOutput(request_id="a", token_ids=[1])
assert (output.token_ids, output.finish_reason) == ([1], None)
print(json.dumps([names, cabochon.engine.load.__file__]))
"""
    names, path = json.loads(run(code % str(importable.ROOT / "benchmarks" / "gpu"), tmp_path, tmp_path))
    assert {"bench_decode", "check_parity", "check_kernels"} <= set(names)
    assert path == str(tmp_path / "packages" / "cabochon" / "engine" / "load.py")


def test_the_gpu_tests_are_collected_without_what_the_server_needs(tmp_path: Path) -> None:
    tests = [str(importable.ROOT / "tests" / name) for name in ("gpu", "kernels")]
    options = ["--collect-only", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider",
               "-p", "no:schemathesis", f"--rootdir={importable.ROOT}", "-c",
               str(importable.ROOT / "pyproject.toml")]  # fmt: skip
    code = "import os; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\n"
    code += f"import pytest; print(int(pytest.main({options + tests!r})))"
    lines = run(code, tmp_path, tmp_path).splitlines()
    assert lines[-1] == "0", lines
    assert any("test_64_greedy_tokens_equal_transformers" in line for line in lines)


def test_wheels_fill_gaps_and_replace_nothing(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels-given"
    wheels.mkdir()
    for package in ("no_such_package_of_ours", "numpy"):
        with zipfile.ZipFile(wheels / f"{package}-1.0-py3-none-any.whl", "w") as file:
            file.writestr(f"{package}.py", "version = 'from the wheel'")
    code = "import no_such_package_of_ours as ours, numpy; print(ours.version, numpy.__version__ != '1.0')"
    assert run(code, tmp_path / "run", wheels).strip() == "from the wheel True"
    assert not (tmp_path / "run" / "wheels" / "numpy.py").exists()


@pytest.mark.parametrize(("name", "is_there"), [("torch", True), ("no_such_package", False)])
def test_what_is_installed(name: str, is_there: bool) -> None:
    assert importable.is_installed(name) is is_there


def test_children_use_no_network(tmp_path: Path) -> None:
    env = importable.environment(tmp_path, tmp_path, {"PYTHONPATH": "/kept"})
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["PYTHONPATH"].endswith(":/kept")
