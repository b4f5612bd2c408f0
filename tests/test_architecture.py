"""The layout is code: imports point one way, and the wheel ships every folder."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, set[str]] = {"kernels": set(), "engine": {"kernels"}, "server": {"engine"}}
NEVER = {
    "kernels": {"ray", "fastapi", "transformers"},
    "engine": {"ray", "fastapi"},
    "server": {"torch", "triton", "transformers"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_down(layer: str) -> None:
    for path in sources(layer):
        for name in imported(path):
            top, _, rest = name.partition(".")
            assert top not in NEVER[layer], f"{path}: {name}"
            if top == "cabochon":
                assert rest.split(".")[0] in MAY_IMPORT[layer] | {layer}, f"{path}: {name}"


def test_only_models_import_transformers_and_accelerate() -> None:
    for path in sources("engine"):
        if path.parent.name != "models":
            tops = {name.partition(".")[0] for name in imported(path)}
            assert not tops & {"transformers", "accelerate", "gguf"}, path


def test_every_folder_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for layer in MAY_IMPORT for path in sources(layer)}
    assert {".".join(("cabochon", *folder.parts)) for folder in folders} == listed


@pytest.mark.parametrize("folder", ["kernels", "tests", "tests/kernels", "engine", "server"])
def test_folders_are_no_top_level_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), "kernels would shadow Hugging Face's `kernels`"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cabochon.server.app", {"torch", "triton", "transformers"}),
        ("cabochon.server.cli", {"torch", "triton", "transformers", "ray", "grpc"}),
        ("cabochon.server.deployment", {"torch", "triton", "transformers"}),
        ("cabochon.server.ray_local", {"torch", "triton", "transformers", "ray"}),
        ("cabochon.engine.client", {"torch", "triton", "transformers"}),
        ("cabochon.engine.models.source", {"torch", "triton", "transformers"}),
        ("cabochon.engine.llm", {"triton", "pydantic", "fastapi"}),
        ("cabochon.engine.load", {"triton", "pydantic", "fastapi"}),
    ],
)
def test_what_a_module_must_not_load(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys; print(sorted({absent!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_cpu_engine_at_work_has_loaded_neither_triton_nor_pyzmq(tiny_gemma2_dir: Path) -> None:
    """Though they are installed: only kernels and their benchmarks, and KV events, import them."""
    code = (
        "import sys; from cabochon.engine.llm import LLM\n"
        "from cabochon.engine.sampling_params import SamplingParams\n"
        f"LLM({str(tiny_gemma2_dir)!r}).generate(['a'], SamplingParams(max_tokens=2))\n"
        "print(sorted({'triton', 'zmq'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_files_and_functions_stay_small(layer: str) -> None:
    for path in sources(layer):
        text = path.read_text()
        assert text.count("\n") <= MAX_FILE_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_no_module_reads_the_environment_but_settings(layer: str) -> None:
    for path in sources(layer):
        if path.name != "settings.py":
            assert "os.environ" not in path.read_text(), path


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_every_module_and_public_function_is_documented(layer: str) -> None:
    for path in sources(layer):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                is_public = not node.name.startswith("_") and node.name != "main"
                assert not is_public or ast.get_docstring(node), f"{path}: {node.name}"
