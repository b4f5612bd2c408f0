"""Everything that wants an NVIDIA GPU, in one command under nine minutes: `make gpu-check`.

    python3 benchmarks/gpu_check.py --out benchmarks/results
    python3 benchmarks/gpu_check.py --device cpu --tiny --out DIRECTORY       a dry run without a GPU

Correctness first, then benchmarks on random weights of Gemma 2's true shapes against rates measured in
the same run. Needs torch, triton, transformers and pytest, no network, and no installation of Cabochon;
`.gpu-wheels` (make gpu-wheels) fills gaps. Rows go to `<gpu>-<date>.jsonl` one by one; each phase is a
program with a limit. At the end it says where every GPU target stands. Exit status 1: a check failed, or
had no time.
"""

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))

import gpu_plan  # noqa: E402 - beside this file, in no package
import gpu_targets  # noqa: E402
import importable  # noqa: E402
from phases import RowFile, run_all  # noqa: E402

BUDGET_S = 520.0
WHEELS = ROOT / ".gpu-wheels"


def gpu_name() -> str | None:
    """As nvidia-smi calls the first GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    run = subprocess.run(asked, capture_output=True, text=True, check=False)
    names = run.stdout.strip().splitlines() if run.returncode == 0 else []
    return names[0] if names else None


def result_file(out: Path, device: str, now: datetime.datetime) -> Path:
    """A file of its own for each machine and day in a directory, or `out` itself if it ends in .jsonl."""
    if out.suffix == ".jsonl":
        return out
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-").removeprefix("nvidia-")
    return out / f"{words}-{now:%Y-%m-%d}.jsonl"


def main() -> int:
    args = parse_args()
    now = datetime.datetime.now(datetime.UTC)
    name = "cpu-dry-run" if args.device == "cpu" else gpu_name()
    if name is None:
        print("gpu-check must run where nvidia-smi finds an NVIDIA GPU, there is none: use another machine")
        return 2
    phases = gpu_plan.cpu_phases() if args.device == "cpu" else gpu_plan.gpu_phases()
    if args.only:
        phases = [phase for phase in phases if any(phase.name.startswith(one) for one in args.only)]
    path = result_file(args.out, name, now)
    stamp: dict[str, object] = {"run": f"{now:%Y-%m-%dT%H:%M:%SZ}"}
    file = RowFile(path, stamp | ({"commit": args.commit} if args.commit else {}))
    with tempfile.TemporaryDirectory() as folder:
        env = importable.environment(Path(folder), args.wheels)
        unproven = run_all(phases, env, file, args.budget_s, partial(print, flush=True))
    file.close()
    print(f"\n{name}, {len(file.rows)} rows in {path}")
    print("\n".join(gpu_targets.table(file.rows)))
    print("\n".join(["checks that proved nothing:", *unproven] if unproven else ["every check was right"]))
    return 1 if unproven else 0


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--tiny", action="store_true", help="tiny shapes; with --device cpu alone")
    p.add_argument("--out", type=Path, help="a directory, or a file that ends in .jsonl")
    p.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all phases together")
    p.add_argument("--only", nargs="+", help="phases whose names begin so")
    p.add_argument("--commit", help="what rows say of the code, where there is no git")
    p.add_argument("--wheels", type=Path, default=WHEELS)
    args = p.parse_args()
    if (args.device == "cpu") != args.tiny:
        p.error("--device cpu and --tiny go together: a dry run measures nothing")
    if args.tiny and args.out is None:
        p.error("a dry run needs --out: its rows are no results")
    args.out = args.out or ROOT / "benchmarks" / "results"
    return args


if __name__ == "__main__":
    sys.exit(main())
