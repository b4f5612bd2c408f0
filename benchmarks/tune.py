"""Searches engine options for the best goodput, or the lowest cost, that keeps an SLO under your own load.

    python benchmarks/tune.py --trials 30 -- --workload sharegpt --arrivals ramp --rate 0.5 \\
        --rounds 1 --slo ttft=1s,itl=100ms

What follows `--` is serving.py's, without a URL. A trial starts `cabochon serve` with some options and puts
that load on it; its figure is that of the best stage in which --slo-share of the requests kept the SLO. The
first trial has the defaults, later ones are Optuna's (TPE). At the end the best and the defaults run again in
interleaved rounds: the search picked its winner among noisy figures, these were not picked.

--folder keeps everything: study.db (Optuna's; the same command goes on where it ended), the rows and the
server's log of each trial. --component DIRECTORY writes a kustomize component for deploy/gke.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import serving
import uvloop
from machine import ROOT, emit, environment
from optuna.trial import FrozenTrial, Trial, TrialState
from tuning.server import ServerFailed, running
from tuning.space import (
    Flags,
    Space,
    approximate_space,
    as_arguments,
    component,
    default_flags,
    default_space,
    parse_choice,
    refusal,
    with_defaults,
)

Row = dict[str, Any]
Measure = Callable[[Flags, str], list[Row]]  # options, a name for files -> rows of serving.py
FIGURES = {"goodput": "goodput_req_per_s", "cost": "usd_per_million_good_output_tokens"}
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
KEPT = (
    "rate", "concurrency", "goodput_req_per_s", "slo_met", "output_tok_per_s", "ttft_p99_ms", "tpot_p99_ms",
    "usd_per_million_good_output_tokens",
)  # fmt: skip


class Infeasible(Exception):
    """Why options have no figure."""


class Tuner:
    """One study: its options, its load, its trials."""

    def __init__(self, args: argparse.Namespace, measure: Measure) -> None:
        """Raises SystemExit if the study in the folder asked something else."""
        self.args = args
        self._measure = measure
        cores = len(os.sched_getaffinity(0))
        space = default_space(args.device, cores) | (
            approximate_space(args.device) if args.approximate else {}
        )
        space |= dict(args.search)
        space = {name: values for name, values in space.items() if name not in args.fixed}
        self.defaults = default_flags(space, cores)
        self.space: Space = with_defaults(space, self.defaults)
        self.study = optuna.create_study(
            storage=f"sqlite:///{args.folder / 'study.db'}", study_name="tune", load_if_exists=True,
            direction="maximize" if args.objective == "goodput" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=args.seed, n_startup_trials=8),
        )  # fmt: skip
        self._check_same()
        self._retry_interrupted()
        if not self.study.trials:
            self.study.enqueue_trial({name: self.defaults[name] for name in self.space})

    def search(self) -> None:
        """What is left of --trials, those of earlier runs counted."""
        left = self.args.trials - sum(trial.state in DONE for trial in self.study.trials)
        self.study.optimize(self._objective, n_trials=max(0, left))

    def best(self) -> FrozenTrial:
        """Raises SystemExit if no options kept the SLO."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.study.trials):
            reasons = sorted({str(trial.user_attrs.get("reason")) for trial in self.study.trials})
            raise SystemExit(
                f"some options must keep the SLO, none of {len(self.study.trials)} trials did"
                f" ({'; '.join(reasons)}): lower the rate or loosen the SLO"
            )
        return self.study.best_trial

    def confirm(self, best: Flags) -> Row:
        """The best beside the defaults, interleaved; the ratio of goodput or cost with its spread."""
        figure = FIGURES[self.args.objective]
        pairs = []
        for number in range(1, self.args.confirm + 1):
            values = {}
            for name, flags in (("default", self.defaults), ("best", best)):
                try:
                    values[name] = self._stage(flags, f"confirm-{number}-{name}")[figure]
                except Infeasible as reason:
                    print(f"round {number}, {name}: {reason}", file=sys.stderr)
            if len(values) == 2:
                pairs.append((values["best"], values["default"]))
        ratios = sorted(best / default for best, default in pairs if default)
        return {
            "rounds": self.args.confirm, "best": [best for best, _ in pairs],
            "default": [default for _, default in pairs],
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
            "ratio_min_max": [round(ratios[0], 3), round(ratios[-1], 3)] if ratios else None,
        }  # fmt: skip

    def _objective(self, trial: Trial) -> float:
        flags: Flags = {name: trial.suggest_categorical(name, values) for name, values in self.space.items()}
        try:
            if (why := refusal(flags)) is not None:
                raise Infeasible(why)
            stage = self._stage(flags, f"trial-{trial.number}")
        except Infeasible as reason:
            trial.set_user_attr("reason", str(reason))
            print(f"trial {trial.number}: {shlex.join(as_arguments(flags))}: {reason}", file=sys.stderr)
            raise optuna.TrialPruned(str(reason)) from None
        trial.set_user_attr("stage", {name: stage[name] for name in KEPT if name in stage})
        value = float(stage[FIGURES[self.args.objective]])
        print(f"trial {trial.number}: {shlex.join(as_arguments(flags))}: {value:g}", file=sys.stderr)
        return value

    def _stage(self, flags: Flags, name: str) -> Row:
        """Figures of the best stage that kept the SLO. Raises Infeasible."""
        try:
            rows = self._measure(flags, name)
        except ServerFailed as failure:
            raise Infeasible(str(failure)) from None
        stages = [row for row in rows if "summary" in row and "slo_met" in row]
        kept = [row for row in stages if (row["slo_met"] or 0.0) >= self.args.slo_share]
        if not kept:
            best = max((row["slo_met"] or 0.0 for row in stages), default=0.0)
            raise Infeasible(f"at most {best:.0%} of the requests kept the SLO")
        return max(kept, key=lambda row: float(row["goodput_req_per_s"]))

    def _check_same(self) -> None:
        """Trials are compared with each other: one load, one machine, one space in a study."""
        args, about = self.args, environment()
        facts = {
            "load": args.load, "serve": args.serve, "objective": args.objective, "slo_share": args.slo_share,
            "space": self.space, "cpu": about["cpu"], "cores": about["cores"],
        }  # fmt: skip
        known = self.study.user_attrs.get("facts")
        if known is None:
            self.study.set_user_attr("facts", facts)
            return
        changed = [name for name, value in json.loads(json.dumps(facts)).items() if known.get(name) != value]
        if changed:
            raise SystemExit(
                f"a study must have one load, space and machine, in {args.folder} it had another"
                f" {', '.join(changed)}: repeat its command, or name another --folder"
            )

    def _retry_interrupted(self) -> None:
        """The options of a trial that was cut short come first. It is still open if the run was killed."""
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            self.study.tell(trial.number, state=TrialState.FAIL)
        trials = self.study.trials
        if trials and trials[-1].state == TrialState.FAIL and trials[-1].params:
            self.study.enqueue_trial(trials[-1].params)


def on_server(args: argparse.Namespace) -> Measure:
    """Starts a server for each measurement and runs serving.py on it in this process."""

    def measure(flags: Flags, name: str) -> list[Row]:
        out = args.folder / f"{name}.jsonl"
        out.unlink(missing_ok=True)
        arguments = [*args.serve, *as_arguments(flags)]
        with running(arguments, args.folder / f"{name}.log", args.start_timeout_s) as url:
            load = serving.parse_args([url, *args.load, "--out", str(out)])
            silence = contextlib.redirect_stdout(io.StringIO())  # its rows are in the file
            with silence, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serving.start(load))
        return [json.loads(line) for line in out.read_text().splitlines()]

    return measure


def report(tuner: Tuner, args: argparse.Namespace) -> None:
    """The best options: as flags, as a row, as a component."""
    best = tuner.best()
    flags: Flags = best.params
    states = [trial.state for trial in tuner.study.trials]
    row: Row = {
        "benchmark": "tune", "summary": f"best of {sum(state in DONE for state in states)} trials",
        "objective": args.objective, "value": best.value, "flags": flags, "defaults": tuner.defaults,
        "infeasible": states.count(TrialState.PRUNED), **best.user_attrs["stage"],
        "trials": [_told(trial) for trial in tuner.study.get_trials(states=DONE)],
        "slo_share": args.slo_share, "load": shlex.join(args.load),
    }  # fmt: skip
    if args.confirm:
        row["confirmed"] = tuner.confirm(flags)
    emit({**row, **environment()}, args.out)
    print(shlex.join(["cabochon", "serve", *args.serve, *as_arguments(flags)]))
    if args.component:
        args.component.mkdir(parents=True, exist_ok=True)
        target = args.component / "kustomization.yaml"
        figure = f"{FIGURES[args.objective]} {best.value:g}"
        found = f"Found by `python benchmarks/tune.py`, {row['summary']}, on {environment()['cpu']}: {figure}"
        target.write_text(component(flags, [found, f"under `{shlex.join(args.load)}`."]))
        print(f"{target}: name its directory among the components of your site")


def _told(trial: FrozenTrial) -> Row:
    """Its options, and its figure or why it has none."""
    end = {"value": trial.value} if trial.value is not None else {"reason": trial.user_attrs.get("reason")}
    return {"flags": trial.params, **end}


def main(argv: list[str] | None = None, measure: Measure | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args.folder.mkdir(parents=True, exist_ok=True)
    tuner = Tuner(args, measure or on_server(args))
    tuner.search()
    report(tuner, args)


def parse_args(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--serve", type=shlex.split, default=[], help="further options of the server, in one word")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="whose options are searched")
    p.add_argument(
        "--search", type=parse_choice, action="append", default=[], metavar="NAME=A,B",
        help="values of an option, instead of or beside the usual ones; may be repeated",
    )  # fmt: skip
    p.add_argument("--fixed", nargs="+", default=[], metavar="NAME", help="options that are not searched")
    p.add_argument("--approximate", action="store_true", help="search quantization and kv_dtype, too")
    p.add_argument("--objective", choices=FIGURES, default="goodput")
    p.add_argument("--slo-share", type=float, default=0.99, help="of requests that must keep the SLO")
    p.add_argument("--trials", type=int, default=30)
    p.add_argument("--confirm", type=int, default=3, help="rounds of the best beside the defaults; 0: none")
    p.add_argument("--folder", type=Path, default=ROOT / "build" / "tune")
    p.add_argument("--component", type=Path, help="directory, such as deploy/gke/components/tuned")
    p.add_argument("--start-timeout-s", type=float, default=900.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="a file for the last row")
    at = argv.index("--") if "--" in argv else len(argv)
    args = p.parse_args(argv[:at])
    args.load = argv[at + 1 :]
    load = serving.parse_args(["http://127.0.0.1", *args.load])  # ends here if it is wrong
    args.fixed = [name.replace("-", "_") for name in args.fixed]
    if not any(load.slo):
        p.error("a search needs an SLO, got none: give --slo ttft=1s,itl=100ms after --")
    if args.objective == "cost" and load.price_per_hour is None:
        p.error("a search for cost needs a price, got none: give --price-per-hour after --")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the server ends with us
    main()
