"""Dockerfile.gpu without Docker: what it copies, pins and starts; the wheel that it builds, served from.

Not checked, for want of a builder and of a GPU: that the images build, that CUDA's wheels work together, and
how they run. The server below runs on this machine's Python and packages, not on the pinned ones.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import dockerfile
import httpx
import psutil
import pytest
from fake_server import wait_until
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tools import ROOT, absent, need_deploy_tools

from cabochon.server.settings import load_settings

IMAGES = ROOT / "deploy" / "gke" / "images"
HEAD, STAGES = dockerfile.read(ROOT / "Dockerfile.gpu")
BY_NAME = {stage.name: stage for stage in STAGES}
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ["ray", "armor", "otel", "kv-events"]
CUDA_ONLY = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
LAYERS = ("engine", "kernels", "server")
START_S = 120


def pins(name: str) -> dict[str, str]:
    """Package to version."""
    lines = [line for line in (IMAGES / name).read_text().splitlines() if not line.startswith("#")]
    return dict(line.split()[0].split("==") for line in lines)


def context_files(source: str) -> list[Path]:
    """The files of the build's context that a COPY's source means."""
    found = [path for root in ROOT.glob(source) for path in ([root] if root.is_file() else root.rglob("*"))]
    names = [path for path in found if path.is_file()]
    return [path for path in names if not dockerfile.is_ignored(str(path.relative_to(ROOT)), IGNORED)]


def sources(stage: dockerfile.Stage) -> Iterator[str]:
    """What the stage copies from the context."""
    for copy in stage.of("COPY"):
        if copy.flag("from") is None:
            yield from copy.words()[:-1]


def test_every_path_that_is_copied_exists_and_is_in_the_context() -> None:
    copied = [source for stage in STAGES for source in sources(stage)]
    assert {"pyproject.toml", "engine/", "deploy/gke/images/gpu.txt"} <= set(copied)
    for source in copied:
        assert context_files(source), source


def test_the_context_has_nothing_else() -> None:
    out = [
        "tests/tools.py", ".git/HEAD", ".venv/bin/python", "docs/architecture.md", "Dockerfile.gpu",
        "deploy/gke/images/resolve.py", "deploy/gke/cluster/config.env",
        "server/__pycache__/app.cpython-312.pyc", "build/lib/x.py",
    ]  # fmt: skip
    assert [path for path in out if not dockerfile.is_ignored(path, IGNORED)] == []


def test_stages_and_arguments_that_are_named_exist() -> None:
    given = HEAD.variables("ARG")
    for index, stage in enumerate(STAGES):
        before = {one.name for one in STAGES[:index]}
        for variable in re.findall(r"\$\{(\w+)", stage.base):
            assert variable in given, stage
        bases = [stage.base]
        if stage.base == "flash-attn-${FLASH_ATTN}":
            assert given["FLASH_ATTN"] == "without"
            bases = ["flash-attn-without", "flash-attn-with"]
        for base in bases:
            is_image = base.startswith(("python:3.12-slim", "nvidia/cuda:"))
            assert is_image or base in before, base
        for copy in stage.of("COPY"):
            assert copy.flag("from") in (None, *before), copy
        known = {"PATH"} | {
            name
            for one in dockerfile.lineage(stage, STAGES)
            for key in ("ARG", "ENV")
            for name in one.variables(key)
        }
        used = re.findall(r"(?<!\\)\$\{?(\w+)", " ".join(one.value for one in stage.instructions))
        assert set(used) <= known, stage.name


def test_the_base_may_be_given_by_digest() -> None:
    assert BY_NAME["python"].base == "python:3.12-slim${PYTHON_DIGEST:+@${PYTHON_DIGEST}}"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_images_do_not_run_as_root(target: str) -> None:
    users = [one.value for stage in dockerfile.lineage(BY_NAME[target], STAGES) for one in stage.of("USER")]
    assert users[-1] == "1000:1000"
    assert STAGES[-1].name == "gpu", "the stage that is built by default"


def test_the_entry_point_and_its_options_exist() -> None:
    (entry,), (command,) = BY_NAME["runtime"].of("ENTRYPOINT"), BY_NAME["runtime"].of("CMD")
    (script,) = entry.words()
    module, _, _ = PROJECT["scripts"][script].partition(":")
    assert find_spec(module) is not None
    verb, *options = command.words()
    assert verb == "serve"
    assert load_settings(options).server.host == "0.0.0.0"


def test_what_the_image_writes_is_below_the_mounts() -> None:
    environment = BY_NAME["runtime"].variables("ENV")
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        assert environment[name].split("/")[1] == "cache", name
    assert "--home-dir /cache" in BY_NAME["runtime"].of("RUN")[0].value


def test_nobody_is_called_home_and_serve_is_left_to_the_manifests() -> None:
    environment = BY_NAME["runtime"].variables("ENV")
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert [name for name in environment if name.startswith("RAY_")] == ["RAY_USAGE_STATS_ENABLED"]


def test_kuberay_and_triton_find_their_programs() -> None:
    installed = {
        target: " ".join(
            one.value for stage in dockerfile.lineage(BY_NAME[target], STAGES) for one in stage.of("RUN")
        )
        for target in ("cpu", "gpu")
    }
    assert all(re.search(r"\bwget\b", text) for text in installed.values())
    assert re.search(r"\bgcc libc6-dev\b", installed["gpu"])
    assert "gcc" not in installed["cpu"]
    assert BY_NAME["gpu"].variables("ENV")["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"


@pytest.mark.parametrize(("file", "extras"), [("gpu.txt", EXTRAS), ("cpu.txt", [*EXTRAS, "demo"])])
def test_every_direct_dependency_is_pinned_within_its_range(file: str, extras: list[str]) -> None:
    """That the pins fit each other and are complete, the resolver and `pip check` in the image say."""
    pinned = pins(file)
    wanted = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if file == "gpu.txt" or not CUDA_ONLY.fullmatch(name):
            assert requirement.specifier.contains(pinned[name], prereleases=True), name


@pytest.mark.parametrize("file", ["gpu.txt", "cpu.txt"])
def test_every_pin_has_a_hash(file: str) -> None:
    for line in (IMAGES / file).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line), (
            line
        )


def test_the_two_images_have_the_same_versions() -> None:
    gpu, cpu = pins("gpu.txt"), pins("cpu.txt")
    assert not [name for name in cpu if CUDA_ONLY.fullmatch(name)]
    assert {
        name: version for name, version in gpu.items() if not CUDA_ONLY.fullmatch(name)
    }.items() <= cpu.items()
    assert BY_NAME["cpu-environment"].variables("ARG")["TORCH_VERSION"] == gpu["torch"]


def test_torch_triton_and_cuda_belong_together() -> None:
    """Kernels are compiled ahead of time by the Triton of the image; flash-attn by its torch's CUDA."""
    gpu = pins("gpu.txt")
    (triton,) = [line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("triton==")]
    assert Requirement(triton).specifier.contains(gpu["triton"])
    image = BY_NAME["flash-attn-with"].base
    assert image.startswith("nvidia/cuda:" + ".".join(gpu["nvidia-cuda-runtime"].split(".")[:2]))


def test_hadolint_finds_nothing() -> None:
    run = subprocess.run(
        [need_deploy_tools() / "hadolint", ROOT / "Dockerfile.gpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_a_resolver_finds_the_same_pins(tmp_path: Path) -> None:
    """With the pinned versions: they fit pyproject.toml and each other, none is missing, hashes are true."""
    python = need_deploy_tools() / "python"
    run = subprocess.run(
        [python, IMAGES / "resolve.py", "--keep", "--output", tmp_path],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if run.returncode != 0 and re.search(r"dns error|client error \(Connect\)|timed out", run.stderr):
        absent("a package index is not reached: pins need one")
    assert run.returncode == 0, run.stderr
    for name in ("gpu.txt", "cpu.txt"):
        assert (tmp_path / name).read_text() == (IMAGES / name).read_text(), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as in the image: from what the stage copies, and nothing else."""
    folder = tmp_path_factory.mktemp("build")
    for source in sources(BY_NAME["wheel"]):
        for path in context_files(source):
            target = folder / "src" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (command,) = (run.value for run in BY_NAME["wheel"].of("RUN") if "pip wheel" in run.value)
    words = command.replace("/wheels", str(folder / "wheels")).split()
    subprocess.run(
        [sys.executable, "-m", *words], cwd=folder / "src", check=True, capture_output=True, timeout=120
    )
    (built,) = (folder / "wheels").iterdir()
    return built


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_layers_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {
        f"cabochon/{path.relative_to(ROOT)}"
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == ours
    assert {path.rpartition(".")[2] for path in packed} >= {"py", "json", "html"}


@pytest.mark.slow
def test_the_wheel_serves_from_an_environment_of_its_own(
    wheel: Path, tmp_path: Path, tiny_gemma2_dir: Path
) -> None:
    """Installed as in the image; its dependencies are this machine's, by a path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    (packages,) = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
    (packages / "dependencies.pth").write_text(str(Path(httpx.__file__).parents[1]))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CABOCHON_", "PYTHON"))}
    where = (
        "import cabochon.server.cli as cli, cabochon.engine.core as core; print(cli.__file__, core.__file__)"
    )
    found = subprocess.run(
        [python, "-c", where], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(packages)) for path in found.stdout.split()), found.stdout
    command = [
        str(python.parent / "cabochon"),
        "serve",
        "--model",
        str(tiny_gemma2_dir),
        "--port=0",
        "--threads=1",
    ]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = psutil.Popen(command, env=env, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "  curl" in log.read_text() or server.poll() is not None, START_S)
        ready = re.search(r"ready at +(\S+)/v1", log.read_text())
        assert ready is not None, log.read_text()
        with httpx.Client(base_url=ready[1], timeout=30) as client:
            assert client.get("/health").status_code == 200
            page = client.get("/")
            assert page.text == (ROOT / "server" / "static" / "index.html").read_text()
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 2
    finally:
        server.terminate()
        assert server.wait(30) == 0
