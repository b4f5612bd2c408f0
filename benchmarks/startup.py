"""Time from `cabochon serve` to the first 200 of /health, and the memory of its processes.

    python benchmarks/startup.py --model demo --rounds 5 --out FILE

A row is one start, page cache warm after the first (dropped) one. `peak_over_resident` compares the engine's
peak with what it holds once ready: loading must not need much more than the model itself. A plain stream and
a structured request are sent as soon as it is ready: `structured_s` is the time to that answer (one of two
words), `longest_gap_ms` the longest time between two tokens of the stream, `usual_gap_ms` the median.
"""

import argparse
import itertools
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from machine import emit, environment

POLL_S = 0.01
DEADLINE_S = 600.0


def start(args: argparse.Namespace) -> tuple[subprocess.Popen[bytes], float]:
    """A server that answers /health, and the seconds it took."""
    command = [
        sys.executable,
        "-m",
        "cabochon.server.cli",
        "serve",
        "--model",
        args.model,
        "--port",
        str(args.port),
    ]
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while time.perf_counter() - started_s < DEADLINE_S:
        assert process.poll() is None, "the server ended: start it by hand to see why"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{args.port}/health", timeout=1):
                return process, time.perf_counter() - started_s
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise TimeoutError(f"/health must be 200 within {DEADLINE_S:g} s")


def memory(pid: int) -> dict[str, int]:
    """Resident bytes now and at most, from /proc."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {"resident_bytes": int(values["VmRSS"]) * 1024, "peak_bytes": int(values["VmHWM"]) * 1024}


def first_answers(port: int) -> dict[str, float]:
    """A stream and a structured request at once, the first that the server gets."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    plain = {"prompt": "The opal", "max_tokens": 100, "ignore_eos": True, "stream": True, "temperature": 0}
    bound = {"prompt": "Opal is", "structured_outputs": {"choice": ["blue", "red"]}}

    def stream() -> list[float]:
        with httpx.Client(timeout=60) as http, http.stream("POST", url, json=plain) as answer:
            return [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]

    with ThreadPoolExecutor() as pool:
        arrivals = pool.submit(stream)
        started_s = time.perf_counter()
        assert httpx.post(url, json=bound, timeout=60).json()["choices"][0]["text"] in ("blue", "red")
        structured_s = time.perf_counter() - started_s
    gaps_s = [after - before for before, after in itertools.pairwise(arrivals.result())]
    return {
        "structured_s": round(structured_s, 2),
        "longest_gap_ms": round(max(gaps_s) * 1000),
        "usual_gap_ms": round(statistics.median(gaps_s) * 1000),
    }


def measure(args: argparse.Namespace) -> dict[str, float]:
    process, ready_s = start(args)
    try:
        (engine,) = psutil.Process(process.pid).children()
        held = memory(engine.pid)
        answers = first_answers(args.port)
        return {
            "ready_s": round(ready_s, 2),
            **answers,
            "engine_resident_mib": held["resident_bytes"] >> 20,
            "peak_over_resident": round(held["peak_bytes"] / held["resident_bytes"], 3),
            "server_resident_mib": memory(process.pid)["resident_bytes"] >> 20,
            "grammar_resident_mib": memory(engine.children()[0].pid)["resident_bytes"] >> 20,
        }
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def main() -> None:
    args = parse_args()
    shape = {"model": args.model, **environment()}
    rows = [measure(args) for _ in range(args.rounds + 1)][1:]
    for number, row in enumerate(rows, 1):
        emit({"start": number, **row, **shape}, args.out)
    medians = {f"median_{name}": statistics.median(row[name] for row in rows) for name in rows[0]}
    emit({"summary": "time to ready", **medians, **shape}, args.out)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a directory or a Hub id")
    p.add_argument("--port", type=int, default=8199)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
