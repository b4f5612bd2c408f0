"""The search on a load whose figures one can compute, and once on a real server."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tune
import yaml
from optuna.trial import TrialState
from tuning import space
from tuning.server import ServerFailed

LOAD = "--slo ttft=1s --price-per-hour 2 --rounds 1"
SMALL = "--search step_tokens=32,256,512 --search max_seqs=16,32 --fixed kv-cache-gib threads"


def stage(goodput: float, slo_met: float, rate: float = 1.0) -> dict[str, Any]:
    figures = {"goodput_req_per_s": goodput, "slo_met": slo_met, "rate": rate, "ttft_p99_ms": 10.0}
    return {"summary": "median of 1", **figures, "usd_per_million_good_output_tokens": 100 / goodput}


class Machine:
    """Goodput is step_tokens / max_seqs in the best stage; a later one is faster and breaks the SLO."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, space.Flags]] = []

    def measure(self, flags: space.Flags, name: str) -> list[dict[str, Any]]:
        self.asked.append((name, flags))
        if flags["step_tokens"] == 256:
            raise ServerFailed("the server ended: out of memory")
        goodput = float(flags["step_tokens"]) / float(flags["max_seqs"])
        met = 0.5 if flags["max_seqs"] == 16 else 1.0
        return [{"round": 1}, stage(goodput / 2, met), stage(goodput, met, 2.0), stage(99.0, 0.6, 4.0)]


def run(tmp_path: Path, machine: Machine, options: str = "", trials: int = 16) -> tune.Tuner:
    given = f"{SMALL} --trials {trials} --folder {tmp_path / 'study'} {options} -- {LOAD}"
    args = tune.parse_args(shlex.split(given))
    args.folder.mkdir(exist_ok=True)
    tuner = tune.Tuner(args, machine.measure)
    tuner.search()
    return tuner


def test_it_finds_the_options_with_the_most_goodput_that_keep_the_slo(tmp_path: Path) -> None:
    machine = Machine()
    tuner = run(tmp_path, machine)
    best = tuner.best()
    assert best.params == {"step_tokens": 512, "max_seqs": 32}, "16 would be faster, and breaks the SLO"
    assert best.value == 16
    assert best.user_attrs["stage"]["rate"] == 2, "the best stage that kept it"
    first = tuner.study.trials[0]
    assert first.params == {"step_tokens": 512, "max_seqs": 64} == tuner.defaults
    assert len(tuner.study.trials) == 16


def test_every_trial_is_kept_with_the_reason_why_it_has_no_figure(tmp_path: Path) -> None:
    machine = Machine()
    tuner = run(tmp_path, machine)
    reasons = {trial.user_attrs["reason"] for trial in tuner.study.trials if trial.state == TrialState.PRUNED}
    assert "the server ended: out of memory" in reasons
    assert "at most 60% of the requests kept the SLO" in reasons
    assert any(reason.startswith("step_tokens must be at least max_seqs = 64") for reason in reasons)
    assert all(int(flags["step_tokens"]) >= int(flags["max_seqs"]) for _, flags in machine.asked)


def test_a_search_goes_on_where_it_ended_and_repeats_what_was_cut_short(tmp_path: Path) -> None:
    class Killed(Machine):
        def measure(self, flags: space.Flags, name: str) -> list[dict[str, Any]]:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().measure(flags, name)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(), trials=6)
    machine = Machine()
    tuner = run(tmp_path, machine, trials=6)
    states = [trial.state for trial in tuner.study.trials]
    assert states.count(TrialState.FAIL) == 1
    assert sum(state in tune.DONE for state in states) == 6
    cut = next(trial for trial in tuner.study.trials if trial.state == TrialState.FAIL)
    assert machine.asked[0] == (f"trial-{cut.number + 1}", cut.params)
    assert run(tmp_path, Machine(), trials=6).study.best_value == tuner.study.best_value


def test_a_trial_that_a_killed_run_left_open_is_repeated(tmp_path: Path) -> None:
    tuner = run(tmp_path, Machine(), trials=1)
    trial = tuner.study.ask()
    params = {name: trial.suggest_categorical(name, values) for name, values in tuner.space.items()}
    after = run(tmp_path, Machine(), trials=2).study.trials
    assert [one.state for one in after[1:2]] == [TrialState.FAIL]
    assert after[2].params == params


def test_a_study_has_one_load_and_one_space(tmp_path: Path) -> None:
    run(tmp_path, Machine(), trials=2)
    with pytest.raises(
        SystemExit, match="it had another space: repeat its command, or name another --folder"
    ):
        run(tmp_path, Machine(), "--search step_tokens=512,1024", trials=2)


def test_the_cheapest_may_be_asked_for_instead(tmp_path: Path) -> None:
    tuner = run(tmp_path, Machine(), "--objective cost")
    assert tuner.best().value == 100 / 16


def test_what_is_found_is_run_again_beside_the_defaults_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Better(Machine):
        def measure(self, flags: space.Flags, name: str) -> list[dict[str, Any]]:
            self.asked.append((name, flags))
            return [stage(3.0 if flags["max_seqs"] == 32 else 2.0, 1.0)]

    machine = Better()
    folder, out = tmp_path / "tuned", tmp_path / "rows.jsonl"
    files = f"--folder {tmp_path / 'study'} --component {folder} --out {out}"
    given = f"{SMALL} --trials 12 --confirm 2 --serve '--dtype bf16' {files} -- {LOAD}"
    tune.main(shlex.split(given), machine.measure)
    row = json.loads(out.read_text())
    assert row["flags"]["max_seqs"] == 32
    assert row["confirmed"] == {
        "rounds": 2, "best": [3.0, 3.0], "default": [2.0, 2.0], "ratio": 1.5, "ratio_min_max": [1.5, 1.5],
    }  # fmt: skip
    assert len(row["trials"]) == 12
    assert {trial["value"] for trial in row["trials"]} == {2.0, 3.0}
    assert all((trial["flags"]["max_seqs"] == 32) == (trial["value"] == 3.0) for trial in row["trials"])
    last = [name for name, _ in machine.asked[-4:]]
    assert last == [f"confirm-{number}-{arm}" for number in (1, 2) for arm in ("default", "best")]
    step = row["flags"]["step_tokens"]
    assert f"cabochon serve --dtype bf16 --step-tokens {step} --max-seqs 32\n" in capsys.readouterr().out
    text = (folder / "kustomization.yaml").read_text()
    written = yaml.safe_load(text)
    assert (written["kind"], len(written["configMapGenerator"])) == ("Component", 1)
    (options,) = written["configMapGenerator"]
    assert (options["name"], options["behavior"]) == ("cabochon-options", "merge")
    assert options["literals"] == [f"CABOCHON_STEP_TOKENS={step}", "CABOCHON_MAX_SEQS=32"]
    assert text.startswith("# Found by `python benchmarks/tune.py`, best of 12 trials, on ")


def test_without_any_options_that_keep_the_slo_it_says_so(tmp_path: Path) -> None:
    class Slow(Machine):
        def measure(self, flags: space.Flags, name: str) -> list[dict[str, Any]]:
            return [stage(1.0, 0.2)]

    tuner = run(tmp_path, Slow(), trials=2)
    with pytest.raises(
        SystemExit, match=r"some options must keep the SLO, none of 2 trials did .*at most 20%"
    ):
        tuner.best()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--trials 1 -- --rate 2", "a search needs an SLO"),
        ("--objective cost -- --slo ttft=1s", "a search for cost needs a price"),
        ("--search nothing=1,2 -- --slo ttft=1s", "invalid parse_choice value"),
        ("-- --slo fast", "invalid parse_slo value"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune.parse_args(shlex.split(given))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_usual_spaces_are_options_that_the_engine_takes(device: str) -> None:
    usual = space.default_space(device, 6)
    defaults = space.default_flags(usual, 6)
    assert space.refusal(defaults) is None
    with_defaults = space.with_defaults(usual, defaults)
    assert all(defaults[name] in values for name, values in with_defaults.items())
    assert space.parse_choice("kv-cache-gib=0.5,1") == ("kv_cache_gib", [0.5, 1])
    assert "quantization" not in usual, "what costs accuracy is chosen by people"
    assert "none" in space.approximate_space("cuda")["quantization"]
    assert "fp8" not in space.approximate_space("cpu").get("quantization", [])
    assert space.as_arguments({"cuda_graphs": False, "max_seqs": 1}) == [
        "--cuda-graphs",
        "false",
        "--max-seqs",
        "1",
    ]


@pytest.mark.slow
def test_two_trials_on_real_servers(
    tiny_gemma2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "rows.jsonl", tmp_path / "study"
    own = (
        f"--trials 2 --confirm 1 --slo-share 0.5 --search max_seqs=4,8 --fixed step_tokens --folder {folder}"
    )
    own += f" --search threads=1 --search kv_cache_gib=0.01 --out {out}"
    serve = f"--model {tiny_gemma2_dir} --device cpu --dtype fp32 --log-level warning"
    load = (
        "--rate 5 --prompt-tokens 8 --output-tokens 4 --top-id 100 --warmup-s 0.2 --duration-s 1 --rounds 1"
    )
    tune.main(shlex.split(f"{own} --serve '{serve}' -- {load} --slo ttft=30s"))
    row = json.loads(out.read_text())
    assert row["value"] > 0
    assert row["flags"]["max_seqs"] in (4, 8, 64)
    assert row["confirmed"]["ratio"] > 0
    assert {path.name for path in folder.glob("*.jsonl")} >= {"trial-0.jsonl", "confirm-1-best.jsonl"}
    assert f"cabochon serve --model {tiny_gemma2_dir}" in capsys.readouterr().out
