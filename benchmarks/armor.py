"""What Model Armor costs: the first token, throughput, and how long text waits for its check.

    python benchmarks/armor.py ttft --out FILE          # a prompt's check beside its prefill
    python benchmarks/armor.py throughput --out FILE    # streams in windows, beside mode off, beside none
    python benchmarks/armor.py delay --out FILE         # first text by mode and time of a check
    python benchmarks/armor.py guard --out FILE         # the guard alone, on text at a steady speed

For the first three, one server, and `cabochon armor-emulator` in a process of its own, --check-s away. The
arms are API keys with policies of their own: one engine, one moment. They alternate, and no prompt comes
twice: neither the prefix cache nor a kept verdict helps. That the guard was at work is read from the
emulator's counts. Temperature 1, EOS ignored. Run nothing else meanwhile; only `guard` mostly sleeps.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from load.client import Client, Record
from load.workloads import COMPLETIONS
from machine import emit, environment

from cabochon.server.armor.response_guard import Windows, guarded
from cabochon.server.armor.verdicts import Mode
from cabochon.server.gateway.http_client import Target, ask, parse_url
from cabochon.server.generation import Delta

TEMPLATES = "projects/demo/locations/local/templates"
ARMS: dict[str, dict[str, Any]] = {  # what their policies change; the options check all, in windows
    "unguarded": {"prompt_template": None, "response_template": None},
    "prompt": {"response_template": None},
    "off": {"mode": "off"},
    "window": {"mode": "window"},
    "strict": {"mode": "strict"},
}
WORDS = [
    *("river", "stone", "market", "winter", "letter", "garden", "engine", "silver", "candle", "harbour"),
    *("music", "window", "forest", "bridge", "paper", "morning", "copper", "journey", "island", "teacher"),
    *("lantern", "village", "orange", "number", "shadow", "kitchen", "travel", "summer", "thunder", "meadow"),
]
TOKEN_CHARS = 4
METHODS = ("SanitizeUserPrompt", "SanitizeModelResponse")


class Bench:
    """A guarded server, its emulator, and prompts that nobody has seen."""

    def __init__(self, server: Target, control: Target, args: argparse.Namespace) -> None:
        self.args = args
        self.about = {"benchmark": "armor", "model": args.model, **environment()}
        self._server = server
        self._control = control
        self._rng = random.Random(args.seed)
        self._numbers = count(1)
        self._clients = {
            arm: Client(Target(server.host, server.port, key=f"key-{arm}"), timeout_s=300) for arm in ARMS
        }

    def close(self) -> None:
        """All connections."""
        for client in self._clients.values():
            client.close()

    async def stream(self, arm: str, num_words: int, max_tokens: int) -> Record:
        """One stream to its end. Raises RuntimeError if it is not whole, or not of tokens that we made."""
        number = next(self._numbers)
        prompt = f"{number}: {' '.join(self._rng.choices(WORDS, k=num_words))}"
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,  # what a draw may write, the emulator may block
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        record = Record(arm, 0.0)
        await self._clients[arm].stream(COMPLETIONS, json.dumps(body).encode(), record)
        if record.error is not None or record.output_tokens != max_tokens or record.cached_tokens:
            raise RuntimeError(
                f"a stream of {arm} must give {max_tokens} tokens without a prefix hit, got"
                f" {record.output_tokens}, {record.cached_tokens} hits, error {record.error}"
            )
        return record

    async def set_check_s(self, seconds: float) -> None:
        """Of every call from now on."""
        answer = await ask(self._control, "PUT", "/latency", seconds)
        if answer.status != 200:
            raise RuntimeError(f"the emulator must take the latency {seconds}, got {answer.status}")

    async def waited_ms(self) -> float:
        """All that first tokens which were ready have waited for verdicts, says the server."""
        text = (await ask(self._server, "GET", "/metrics")).body.decode()
        (seconds,) = re.findall(r"^cabochon:guard_ttft_added_seconds_sum (\S+)$", text, re.MULTILINE)
        return float(seconds) * 1e3

    @asynccontextmanager
    async def counted(self, calls: dict[str, int]) -> AsyncIterator[None]:
        """Adds to `calls`, by method, those made inside."""
        before = await self._counts()
        yield
        for method, total in (await self._counts()).items():
            calls[method] = calls.get(method, 0) + total - before[method]

    async def _counts(self) -> dict[str, int]:
        state = (await ask(self._control, "GET", "/")).json()
        return {method: state["counts"].get(method, 0) for method in METHODS}


async def ttft(bench: Bench) -> None:
    """Pairs of requests, each alone on the server, either first in turn: without and with a check."""
    args = bench.args
    arms = ("unguarded", "prompt")
    pairs: list[dict[str, float]] = []
    calls: dict[str, int] = {}
    waited_ms = 0.0
    for number in range(-args.warm_up, args.pairs):
        if number == 0:
            waited_ms = await bench.waited_ms()
        times: dict[str, float] = {}
        for arm in arms[:: 1 if number % 2 else -1]:
            async with bench.counted(calls):
                record = await bench.stream(arm, args.prompt_words, 4)
            times[arm] = (record.event_s[0] - record.sent_s) * 1e3
        if number >= 0:
            pairs.append(times)
            row = {f"{arm}_ms": round(value, 2) for arm, value in times.items()}
            emit({"case": "ttft", "pair": number, **row, **bench.about}, args.out)
    expect(calls["SanitizeUserPrompt"], args.pairs + args.warm_up, "a check for each guarded prompt")
    waited_ms = await bench.waited_ms() - waited_ms
    added = [pair["prompt"] - pair["unguarded"] for pair in pairs]
    quartiles = statistics.quantiles(added, n=4)
    summary = {f"{arm}_ms": round(statistics.median(pair[arm] for pair in pairs), 2) for arm in arms}
    summary |= {
        "added_ms": round(statistics.median(added), 2),
        "added_quartiles_ms": [round(quartiles[0], 2), round(quartiles[2], 2)],
        "waited_for_verdict_mean_ms": round(waited_ms / args.pairs, 3),
    }
    shape = {"prompt_tokens": record.prompt_tokens, "check_ms": args.check_s * 1e3, "pairs": args.pairs}
    emit({"case": "ttft", "summary": "medians", **summary, **shape, **bench.about}, args.out)


async def throughput(bench: Bench) -> None:
    """Rounds of many streams at once, whole time of a round; each begins with another of the arms.

    unguarded: nothing is checked. off: prompts alone. window: all text.
    """
    args = bench.args
    arms = ("unguarded", "off", "window")
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    calls: dict[str, dict[str, int]] = {arm: {} for arm in arms}
    for number in range(args.rounds + 1):
        for arm in rotated(arms, number):
            started_s = time.perf_counter()
            async with bench.counted(calls[arm]):
                streams = [
                    bench.stream(arm, args.short_words, args.output_tokens) for _ in range(args.streams)
                ]
                await asyncio.gather(*streams)
            rate = args.streams * args.output_tokens / (time.perf_counter() - started_s)
            if number:  # the first is a warm-up
                rates[arm].append(rate)
                row = {"case": "throughput", "round": number, "arm": arm, "output_tok_per_s": round(rate, 1)}
                emit({**row, **bench.about}, args.out)
    num_guarded = (args.rounds + 1) * args.streams
    for arm in ("off", "window"):
        expect(calls[arm]["SanitizeUserPrompt"], num_guarded, "a check for each guarded prompt")
    expect(calls["window"]["SanitizeModelResponse"], num_guarded, "one at least for each guarded answer")
    summary: dict[str, object] = {arm: round(statistics.median(rates[arm]), 1) for arm in arms}
    ratios = {base: [w / b for w, b in zip(rates["window"], rates[base], strict=True)] for base in arms[:2]}
    summary |= {
        "ratios": {
            base: {
                "ratio": round(statistics.median(of), 3),
                "ratio_min_max": [round(min(of), 3), round(max(of), 3)],
            }
            for base, of in ratios.items()
        },
        "answer_checks_per_stream": round(calls["window"]["SanitizeModelResponse"] / num_guarded, 2),
        "streams": args.streams,
        "output_tokens": args.output_tokens,
        "check_ms": args.check_s * 1e3,
    }
    emit({"case": "throughput", "summary": "median output tok/s", **summary, **bench.about}, args.out)


async def delay(bench: Bench) -> None:
    """One stream at a time: when its first text comes, when its last, and the longest pause between."""
    args = bench.args
    for check_s in args.check_times:
        await bench.set_check_s(check_s)
        for arm in ("unguarded", "window", "strict"):
            rows: list[dict[str, float]] = []
            for _ in range(args.repeats):
                calls: dict[str, int] = {}
                async with bench.counted(calls):
                    record = await bench.stream(arm, args.short_words, args.delay_tokens)
                gaps_s = [after - before for before, after in pairwise(record.event_s)]
                rows.append(
                    {
                        "first_text_ms": (record.event_s[0] - record.sent_s) * 1e3,
                        "end_ms": (record.end_s - record.sent_s) * 1e3,
                        "longest_gap_ms": max(gaps_s, default=0.0) * 1e3,
                        "answer_checks": calls["SanitizeModelResponse"],
                    }
                )
            medians = {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]}
            spread = [round(min(row["first_text_ms"] for row in rows), 1)]
            spread.append(round(max(row["first_text_ms"] for row in rows), 1))
            shape = {"check_ms": check_s * 1e3, "output_tokens": args.delay_tokens, "repeats": args.repeats}
            summary = {"summary": "medians", "arm": arm, **medians, "first_text_min_max_ms": spread, **shape}
            emit({"case": "delay", **summary, **bench.about}, args.out)
    await bench.set_check_s(args.check_s)


async def guard(args: argparse.Namespace) -> None:
    """No server and no model: text at a steady speed, a sleep for a check, the guard between. All at once."""
    sizes = [tuple(map(int, size.split(":"))) for size in args.windows]
    shapes: list[tuple[Mode, tuple[int, ...]]] = [("strict", sizes[0]), *(("window", size) for size in sizes)]
    about = {"benchmark": "armor", "chars": args.chars, "repeats": args.repeats, **environment()}
    for speed in args.chars_per_s:
        cases = [(mode, size, check_s) for mode, size in shapes for check_s in args.check_times]
        runs = [guard_alone(*case, speed, args.chars) for case in cases for _ in range(args.repeats)]
        found = await asyncio.gather(*runs)
        for index, (mode, size, check_s) in enumerate(cases):
            rows = found[index * args.repeats :][: args.repeats]
            medians = {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]}
            first = [row["first_text_ms"] for row in rows]
            shape = {"arm": mode, "windows": list(size), "check_ms": check_s * 1e3, "chars_per_s": speed}
            spread = {"first_text_min_max_ms": [round(min(first), 1), round(max(first), 1)]}
            emit({"case": "guard", "summary": "medians", **shape, **medians, **spread, **about}, args.out)


async def guard_alone(
    mode: Mode, size: tuple[int, ...], check_s: float, chars_per_s: float, num_chars: int
) -> dict[str, float]:
    """One answer through the guard. Times in ms from its first character's turn."""
    loop = asyncio.get_running_loop()
    text = " ".join(random.Random(0).choices(WORDS, k=num_chars))[:num_chars]
    started_s = loop.time()
    num_checks = 0

    async def deltas() -> AsyncGenerator[Delta, None]:
        for start in range(0, num_chars, TOKEN_CHARS):
            end = min(start + TOKEN_CHARS, num_chars)
            await asyncio.sleep(started_s + end / chars_per_s - loop.time())
            yield Delta(0, text[start:end], 1, 0, "length" if end == num_chars else None, None)

    async def approve(_context: str, unchecked: str) -> str:
        nonlocal num_checks
        num_checks += 1
        await asyncio.sleep(check_s)
        return unchecked

    shown_s: list[float] = []
    windows = Windows(first_chars=size[0], max_chars=size[1])
    async for delta in guarded(deltas(), approve, mode=mode, windows=windows):
        if delta.text:
            shown_s.append(loop.time() - started_s)
    return {
        "first_text_ms": shown_s[0] * 1e3,
        "end_ms": shown_s[-1] * 1e3,
        "longest_gap_ms": max((later - sooner for sooner, later in pairwise(shown_s)), default=0.0) * 1e3,
        "answer_checks": num_checks,
    }


def rotated(arms: Sequence[str], number: int) -> Sequence[str]:
    """In each round another is first, so that none has the warmer machine."""
    start = number % len(arms)
    return [*arms[start:], *arms[:start]]


def expect(found: int, least: int, what: str) -> None:
    """Raises RuntimeError if the emulator was asked less often: then something else was measured."""
    if found < least:
        raise RuntimeError(f"the emulator must see {what}: {least}, got {found}")


PARTS = {"ttft": ttft, "throughput": throughput, "delay": delay}
ALL = (*PARTS, "guard")


@contextmanager
def running(*arguments: str, lines: Sequence[str]) -> Iterator[list[str]]:
    """A command of `cabochon`. lines: patterns, each found once in what it prints; yields their groups."""
    command = [sys.executable, "-m", "cabochon.server.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found: list[str] = []
        for line in process.stdout:
            if match := re.search(lines[len(found)], line):
                found.append(match[1])
            if len(found) == len(lines):
                break
        else:
            raise RuntimeError(f"{arguments[0]} must start, it ended with {process.wait()}")
        yield found
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def write_policies(path: Path) -> None:
    """A key for each arm."""
    keys = [{"name": arm, "key": f"key-{arm}", **changes} for arm, changes in ARMS.items()]
    path.write_text(json.dumps({"keys": keys}))  # which is YAML, too


async def measure(server: Target, control: Target, args: argparse.Namespace) -> None:
    bench = Bench(server, control, args)
    try:
        for part in [part for part in PARTS if part in args.parts]:
            await PARTS[part](bench)
    finally:
        bench.close()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if "guard" in args.parts:
        asyncio.run(guard(args))
    if args.parts == ["guard"]:
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_policies(folder / "policies.yaml")
        emulator = ("armor-emulator", "--port", "0", "--control-port", "0", "--latency", str(args.check_s))
        control, endpoint = stack.enter_context(
            running(*emulator, lines=[r"control at (http://[^/\s]+)", r"--armor-endpoint (\S+)"])
        )
        options = [
            *("--armor-endpoint", endpoint, "--armor-insecure", "--armor-quota-per-min", "1000000"),
            *("--armor-prompt-template", f"{TEMPLATES}/prompt"),
            *("--armor-response-template", f"{TEMPLATES}/response"),
            *("--armor-policy-file", str(folder / "policies.yaml")),
            *("--model", args.model, "--port", "0", "--log-level", "warning", *args.serve),
        ]
        (url,) = stack.enter_context(running("serve", *options, lines=[r"ready at +(\S+)/v1"]))
        asyncio.run(measure(parse_url(url), parse_url(control), args))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("parts", nargs="*", help=f"of {', '.join(ALL)}; none: all")
    add("--model", default="demo", help="demo, a directory or a Hub id")
    add("--check-s", type=float, default=0.25, help="how far the emulator is away (ttft, throughput)")
    add("--pairs", type=int, default=50, help="of ttft")
    add("--warm-up", type=int, default=3, help="pairs before those")
    add("--prompt-words", type=int, default=600, help="of ttft: a prefill longer than the check")
    add("--short-words", type=int, default=64, help="of the other parts")
    add("--streams", type=int, default=16)
    add("--output-tokens", type=int, default=96, help="of throughput")
    add("--rounds", type=int, default=5)
    add("--check-times", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="seconds, of delay and guard")
    add("--delay-tokens", type=int, default=192)
    add("--repeats", type=int, default=3)
    add("--chars", type=int, default=2000, help="of an answer, for guard")
    add("--chars-per-s", type=float, nargs="+", default=[200], help="of guard")
    add("--windows", nargs="+", default=["160:512"], metavar="FIRST:MAX", help="characters, of guard")
    add("--seed", type=int, default=0)
    add("--serve", nargs=argparse.REMAINDER, default=[], help="last: further options of `cabochon serve`")
    add("--out", type=Path)
    args = p.parse_args(argv)
    if wrong := set(args.parts) - set(ALL):
        p.error(f"a part must be one of {', '.join(ALL)}, got {', '.join(sorted(wrong))}")
    args.parts = args.parts or list(ALL)
    return args


if __name__ == "__main__":
    main()
