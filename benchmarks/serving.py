"""Load on any OpenAI endpoint: latencies, goodput at an SLO and cost, at a rate or up to saturation.

    cabochon serve --model demo &
    python benchmarks/serving.py http://127.0.0.1:8000 --rate 2 --slo ttft=500ms,itl=80ms --out FILE
    python benchmarks/serving.py http://127.0.0.1:8000 --arrivals ramp --rate 0.5 --out FILE

Arrivals: poisson, bursty (--burstiness), trace (--trace FILE), closed (--concurrency), ramp (each stage has
--factor times the rate of the one before, until the server falls behind). Workloads: fixed, sharegpt, chat
(shared prefixes), head-of-line (short requests without and with a long prompt now and then), schema.
A row is a round; the last ones have medians and the spread over rounds. Requests of the warm-up are sent and
not counted. Latencies count from when a request was due. The client reports its own lag and CPU share, and
warns when the figures may be its own.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop
from load import arrivals
from load.client import Client, Record
from load.drive import Planned, Run, closed_loop, open_loop
from load.server_side import Queued, queue_figures, scrape_queue
from load.summary import Row, Slo, median_of, parse_slo, summarize
from load.workloads import Asker, Draw, fixed, schema, shared_prefix, sharegpt
from machine import emit, environment

from cabochon.server.gateway.http_client import Target, ask, parse_url

LATE_SHARE = (
    0.1  # of a stage's length: a backlog that takes longer to clear means that the server fell behind
)
TIMELINE = 150  # requests in the row that the report draws
FACTS = ("arrivals", "workload", "prompt_tokens", "output_tokens", "duration_s", "warmup_s",
         "price_per_hour", "max_in_flight")  # fmt: skip
FACTS_OF = {"bursty": "burstiness", "closed": "concurrency", "sharegpt": "scale"}  # of a kind of load alone


class Stage(NamedTuple):
    """One measurement. name: of its arm, empty if there is one."""

    rate: float | None
    arm: str = ""


class Bench:
    """One command's work: rounds of stages against one server."""

    def __init__(self, args: argparse.Namespace, target: Target, model: str) -> None:
        self.args = args
        self.target = target
        asker = Asker(
            model=model, has_ids=not args.words, top_id=args.top_id, ignores_eos=not args.respect_eos
        )
        self.asker = asker
        draws: dict[str, Draw] = {
            "fixed": fixed(asker, args.prompt_tokens, args.output_tokens),
            "sharegpt": sharegpt(asker, args.scale),
            "chat": shared_prefix(
                asker, args.prefixes, args.prefix_tokens, args.prompt_tokens, args.output_tokens
            ),
            "head-of-line": fixed(asker, args.prompt_tokens, args.output_tokens, "short"),
            "schema": schema(asker, args.prompt_tokens, args.output_tokens),
        }
        self.draw = draws[args.workload]
        self.about: Row = {
            "benchmark": "serving",
            "model": model,
            **{name: getattr(args, name) for name in FACTS if getattr(args, name) is not None},
            **{
                fact: getattr(args, fact)
                for kind, fact in FACTS_OF.items()
                if kind in (args.arrivals, args.workload)
            },
            **environment(),
        }

    async def run(self) -> None:
        """All rounds; then a row of medians for each stage."""
        found: dict[Stage, list[Row]] = {}
        timeline: Row = {}
        for number in range(1, self.args.rounds + 1):
            usual_s: float | None = None
            for stage in self.stages():
                run, queue = await self._measure(stage, number)
                late_s = _drain_s(run)
                usual_s = late_s if usual_s is None else usual_s
                row: Row = {
                    **_named(stage),
                    **summarize(run.records, run.window_s, self.args.slo, self.args.price_per_hour),
                    **queue,
                    **run.client(),
                }
                if self.args.arrivals == "ramp":
                    row["saturated"] = late_s > usual_s + LATE_SHARE * self.args.duration_s
                found.setdefault(stage, []).append(row)
                emit({"round": number, **row, **self.about}, self.args.out)
                for warning in run.warnings(is_bounded=self.args.max_in_flight is not None):
                    print(f"warning: {warning}", file=sys.stderr)
                timeline = {**_named(stage), **_timeline(run)}
                if row.get("saturated"):
                    break
        for stage, rows in found.items():
            summary: Row = {"summary": f"median of {len(rows)}", **_named(stage), **median_of(rows)}
            if self.args.arrivals == "ramp":
                summary["saturated"] = sum(bool(row["saturated"]) for row in rows) * 2 > len(rows)
            emit({**summary, "slo": rows[0]["slo"], **_curve(rows), **self.about}, self.args.out)
        if self.args.workload == "head-of-line":
            emit({**_ratio(found), **self.about}, self.args.out)
        if self.args.timeline:
            emit({**timeline, **self.about}, self.args.out)

    def stages(self) -> Iterator[Stage]:
        """In the order of a round."""
        args = self.args
        if args.arrivals == "ramp":
            yield from (Stage(round(args.rate * args.factor**index, 4)) for index in range(args.max_stages))
        elif args.workload == "head-of-line":
            yield from (Stage(args.rate, "short alone"), Stage(args.rate, "with a long one"))
        else:
            yield Stage(args.rate if args.arrivals in ("poisson", "bursty") else None)

    def plan(self, stage: Stage, rng: np.random.Generator) -> list[Planned]:
        """Requests of an open loop. Both arms of one round have the same short ones."""
        args = self.args
        if args.arrivals == "trace":
            traced = arrivals.read_trace(args.trace, args.trace_speed)
            return [
                Planned(one.at_s, self.asker.completion(rng, one.prompt_tokens, one.output_tokens))
                for one in traced
            ]
        assert stage.rate is not None
        cv = args.burstiness if args.arrivals == "bursty" else 1.0
        end_s = args.warmup_s + args.duration_s
        times = arrivals.until(arrivals.bursty(stage.rate, cv, rng), end_s)
        plan = [Planned(at_s, self.draw(rng)) for at_s in times]
        if stage.arm == "with a long one":
            draw = fixed(self.asker, args.long_tokens, args.output_tokens, "long")
            plan += [
                Planned(at_s, draw(rng)) for at_s in arrivals.until(arrivals.every(args.long_every_s), end_s)
            ]
        return sorted(plan, key=lambda planned: planned.at_s)

    async def _measure(self, stage: Stage, number: int) -> tuple[Run, dict[str, float]]:
        """Records, and how long requests queued."""
        args = self.args
        rng = np.random.default_rng([args.seed, number])
        before: list[Queued | None] = []

        async def at_window() -> None:
            before.append(await scrape_queue(self.target))

        client = Client(self.target, args.timeout_s)
        try:
            if args.arrivals == "closed":
                run = await closed_loop(
                    client, self.draw, rng, args.concurrency,
                    warmup_s=args.warmup_s, duration_s=args.duration_s, at_window=at_window,
                )  # fmt: skip
            else:
                run = await open_loop(
                    client, self.plan(stage, rng), warmup_s=args.warmup_s, duration_s=args.duration_s,
                    max_in_flight=args.max_in_flight, at_window=at_window,
                )  # fmt: skip
        finally:
            client.close()
        return run, queue_figures(before[0] if before else None, await scrape_queue(self.target))


def _named(stage: Stage) -> Row:
    return {name: value for name, value in stage._asdict().items() if value}


def _drain_s(run: Run) -> float:
    """From the end of the window to the last answer's."""
    return max((one.end_s for one in run.records), default=run.window_s[1]) - run.window_s[1]


def _curve(rows: list[Row]) -> Row:
    """The middle round's distribution of TTFT, by its median."""
    drawn = sorted(
        (row for row in rows if "ttft_curve_ms" in row), key=lambda row: float(str(row["ttft_p50_ms"]))
    )
    return {"ttft_curve_ms": drawn[len(drawn) // 2]["ttft_curve_ms"]} if drawn else {}


def _ratio(found: dict[Stage, list[Row]]) -> Row:
    """How much longer the short ones wait (p99 of TTFT) when a long prompt comes now and then."""
    alone, beside = found.values()
    pairs = []
    for quiet, busy in zip(alone, beside, strict=True):
        kinds = busy.get("by_kind")
        assert isinstance(kinds, dict), "no long prompt came: make --duration-s longer than --long-every-s"
        pairs.append(kinds["short"]["ttft_p99_ms"] / float(str(quiet["ttft_p99_ms"])))
    return {
        "summary": "p99 TTFT of short requests, with a long prompt over without",
        "ratio": round(float(np.median(pairs)), 3),
        "ratio_min_max": [round(min(pairs), 3), round(max(pairs), 3)],
    }


def _timeline(run: Run) -> Row:
    """[due, sent, first text, end] in seconds, and what it was, for the first requests of the window."""

    def times(one: Record) -> list[object]:
        marks = (one.scheduled_s, one.sent_s, one.event_s[0] if one.event_s else None, one.end_s)
        return [
            *(None if at_s is None else round(at_s - run.window_s[0], 4) for at_s in marks),
            one.error or one.kind,
        ]

    inside = [one for one in run.records if run.window_s[0] <= one.scheduled_s < run.window_s[1]]
    return {"timeline": [times(one) for one in inside[:TIMELINE]]}


async def start(args: argparse.Namespace) -> None:
    """Find the model's name, then measure."""
    key = args.api_key_file.read_text().strip() if args.api_key_file else None
    target = parse_url(args.url.rstrip("/").removesuffix("/v1"), key)
    model = args.model
    if model is None:
        answer = (await ask(target, "GET", "/v1/models")).json()
        model = str(answer["data"][0]["id"])
    await Bench(args, target, model).run()


def main() -> None:
    args = parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(start(args))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("url", help="http://HOST:PORT")
    p.add_argument("--model", help="its name there; default: the first of /v1/models")
    p.add_argument("--api-key-file", type=Path, help="a file, so that the key is in no command")
    p.add_argument("--arrivals", choices=["poisson", "bursty", "trace", "closed", "ramp"], default="poisson")
    p.add_argument(
        "--rate", type=float, default=1.0, help="requests per second; of the first stage of a ramp"
    )
    p.add_argument(
        "--burstiness", type=float, default=3.0, help="bursty: standard deviation ÷ mean of the gaps"
    )
    p.add_argument("--concurrency", type=int, default=8, help="closed: requests at once")
    p.add_argument("--trace", type=Path, help="JSON lines: timestamp (ms), input_length, output_length")
    p.add_argument("--trace-speed", type=float, default=1.0)
    p.add_argument("--factor", type=float, default=1.4, help="ramp: from one stage's rate to the next")
    p.add_argument("--max-stages", type=int, default=12)
    workloads = ["fixed", "sharegpt", "chat", "head-of-line", "schema"]
    p.add_argument("--workload", choices=workloads, default="fixed")
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--scale", type=float, default=1.0, help="sharegpt: lengths times this")
    p.add_argument("--prefixes", type=int, default=8, help="chat: different shared beginnings")
    p.add_argument("--prefix-tokens", type=int, default=1024)
    p.add_argument("--long-tokens", type=int, default=8000, help="head-of-line: the long prompt")
    p.add_argument("--long-every-s", type=float, default=2.0)
    p.add_argument(
        "--words", action="store_true", help="text instead of token ids, for servers that take no ids"
    )
    p.add_argument("--top-id", type=int, default=200_000, help="token ids are below it")
    p.add_argument(
        "--respect-eos", action="store_true", help="send no ignore_eos, which only vLLM and we know"
    )
    p.add_argument("--warmup-s", type=float, default=5.0)
    p.add_argument("--duration-s", type=float, default=30.0)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--timeout-s", type=float, default=600.0, help="of one request")
    p.add_argument(
        "--max-in-flight", type=int, help="open loop: at most so many at once; those that wait count it"
    )
    p.add_argument(
        "--slo", type=parse_slo, default=Slo(), help="ttft=500ms,itl=50ms,e2e=10s, or some of them"
    )
    p.add_argument("--price-per-hour", type=float, help="of the machine, in dollars")
    p.add_argument(
        "--timeline", action="store_true", help="a row with the times of single requests, for the report"
    )
    p.add_argument("--out", type=Path)
    args = p.parse_args(argv)
    if args.arrivals == "trace" and args.trace is None:
        p.error("--arrivals trace needs --trace FILE: name one")
    if args.workload == "head-of-line" and args.arrivals not in ("poisson", "bursty"):
        p.error("head-of-line needs --arrivals poisson or bursty: long prompts come beside them")
    return args


if __name__ == "__main__":
    main()
