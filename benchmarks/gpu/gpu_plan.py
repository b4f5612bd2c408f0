"""What a GPU check runs, in order of importance: what there is no time for comes last."""

import shutil
from pathlib import Path

from phases import Phase, python

GPU = Path(__file__).parent
KERNELS = GPU.parent / "kernels"
ROOT = GPU.parents[1]
SANITIZER = "compute-sanitizer"
SANITIZER_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # where CUDA puts it, on PATH or not
VARIANTS = ("plain", "fast", "fast, fp8 KV", "fast, fp8 weights")
NO_GPU = "needs an NVIDIA GPU"
# Benchmarks of kernels in a short form: a few shapes, 40 ms a row.
SHORT: dict[str, tuple[str, ...]] = {
    "sandwich_norm": ("--tokens", "1", "256", "--hidden", "2304", "3584"),
    "qkv_rope_write": ("--tokens", "1", "256", "--models", "2B", "9B"),
    "sample": ("--rows", "1", "256", "--vocab-tile", "2048"),
    "geglu": ("--tokens", "1", "256", "--mlp", "9216", "14336"),
    "embed_norm": ("--tokens", "1", "256", "--hidden", "2304", "3584"),
    "rms_norm": ("--tokens", "1", "256", "--hidden", "2304", "3584"),
    "prepare_inputs": ("--seqs", "1", "256"),
    "lora": ("--tokens", "256", "4096", "--adapters", "1", "32", "--layers", "9B qkv", "9B down"),
}


def gpu_phases() -> list[Phase]:
    """On an NVIDIA GPU."""
    return _phases("cuda")


def cpu_phases() -> list[Phase]:
    """A dry run on tiny shapes: whether the programs work. What has no meaning on a CPU is absent."""
    return [phase if "--tiny" in phase.argv else _without_gpu(phase) for phase in _phases("cpu")]


def _phases(device: str) -> list[Phase]:
    return [
        *_engine_phases(device),
        *_attention_phases(),
        _offline(device),
        *sanitizer_phases(),
        Phase(name="decode 27b", argv=_decode("27b", "32", "fast"), limit_s=60),
        *(
            Phase(
                name=f"kernel {name}",
                argv=python(KERNELS / f"bench_{name}.py", "--reps-ms", 40, *shapes),
                limit_s=30,
            )
            for name, shapes in SHORT.items()
        ),
    ]


def sanitizer_phases() -> list[Phase]:
    """Every kernel family once under each tool."""
    path = shutil.which(SANITIZER) or shutil.which(SANITIZER, path=":".join(SANITIZER_FOLDERS))
    options = ("--error-exitcode", "9", *python(GPU / "check_kernels.py"))
    return [
        Phase(
            name=tool,
            argv=(path or SANITIZER, "--tool", tool, *options),
            limit_s=60,
            is_check=True,
            absent=None if path else f"{SANITIZER} is not installed",
            env=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )
        for tool in ("memcheck", "racecheck")
    ]


def _engine_phases(device: str) -> list[Phase]:
    more = ("--device", device, *(("--tiny",) if device == "cpu" else ()))
    tests = Phase(
        name="tests",
        argv=python(GPU / "check_tests.py", ROOT / "tests" / "gpu", ROOT / "tests" / "kernels"),
        limit_s=90,
        is_check=True,
    )
    return [
        Phase(name="roofline", argv=python(GPU / "bench_roofline.py", *more), limit_s=45),
        Phase(name="kernels once", argv=python(GPU / "check_kernels.py"), limit_s=60, is_check=True),
        Phase(name="parity", argv=python(GPU / "check_parity.py", *more), limit_s=120, is_check=True),
        tests,
        Phase(
            name="same tokens", argv=python(GPU / "check_same_tokens.py", *more), limit_s=80, is_check=True
        ),
        Phase(name="decode 2b", argv=(*_decode("2b", "1", "64", "256", *VARIANTS), *more), limit_s=100),
        Phase(
            name="decode 9b", argv=(*_decode("9b", "128", "plain", "fast", "fast, fp8 KV"), *more), limit_s=70
        ),
        Phase(name="prefill 9b", argv=python(GPU / "bench_prefill.py", *more), limit_s=50),
    ]


def _attention_phases() -> list[Phase]:
    shapes = {"decode": ("256x1024", "32x8192"), "prefill": ("1x8192x8192", "8x1024x1024")}
    return [
        Phase(
            name=f"kernel {kind}_attention",
            argv=python(KERNELS / f"bench_{kind}_attention.py", "--reps-ms", 60, "--shapes", *chosen),
            limit_s=80,
        )
        for kind, chosen in shapes.items()
    ]


def _offline(device: str) -> Phase:
    more = ("--device", device, *(("--tiny",) if device == "cpu" else ()))
    return Phase(name="offline", argv=python(GPU / "bench_offline.py", *more), limit_s=80)


def _decode(size: str, *seqs_and_variants: str) -> tuple[str, ...]:
    seqs = [one for one in seqs_and_variants if one.isdecimal()]
    variants = [one for one in seqs_and_variants if not one.isdecimal()]
    chosen = ("--variants", *variants) if variants else ()
    return python(GPU / "bench_decode.py", "--size", size, "--seqs", *seqs, *chosen)


def _without_gpu(phase: Phase) -> Phase:
    return Phase(name=phase.name, argv=phase.argv, limit_s=phase.limit_s, absent=NO_GPU)
