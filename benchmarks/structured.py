"""Throughput over HTTP with a schema beside throughput without, on one server.

    python benchmarks/structured.py --streams 16 --output-tokens 96 --rounds 5 --out FILE

Each round runs both arms, one after the other, with the same number of streams, prompts never seen before,
temperature 1 and the same number of tokens: the schema is of a list that is longer than they are. A row is an
arm of a round: output tokens per second. The last row has the median ratio. A warm-up of each is dropped.
"""

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
from load.workloads import STONES
from machine import emit, environment

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_eos": True},
    "schema": {"structured_outputs": {"json": STONES}},
}


async def run(
    client: openai.AsyncOpenAI, args: argparse.Namespace, extra: dict[str, Any], nonce: int
) -> float:
    """Output tokens per second of one arm."""

    async def one(index: int) -> int:
        stream = await client.completions.create(
            model=args.model,
            prompt=f"Gems no. {nonce}-{index}, a list in JSON:",
            max_tokens=args.output_tokens,
            temperature=1,
            seed=nonce * 1000 + index,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        made = 0
        async for chunk in stream:
            made = chunk.usage.completion_tokens if chunk.usage else made
        assert made == args.output_tokens, f"{made} tokens: every stream must give all of its output"
        return made

    started_s = time.perf_counter()
    made = sum(await asyncio.gather(*(one(index) for index in range(args.streams))))
    return made / (time.perf_counter() - started_s)


async def compare(url: str, args: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    about = {
        "model": args.model,
        "streams": args.streams,
        "output_tokens": args.output_tokens,
        **environment(),
    }
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        for index in range(args.rounds + 1):
            for arm, extra in ARMS.items():
                rate = await run(client, args, extra, 2 * index + list(ARMS).index(arm))
                if index:  # the first is a warm-up
                    rates[arm].append(rate)
                    emit({"arm": arm, "round": index, "output_tok_per_s": round(rate, 1), **about}, args.out)
    pairs = [bound / free for bound, free in zip(rates["schema"], rates["plain"], strict=True)]
    ratio = {
        "ratio": round(statistics.median(pairs), 3),
        "ratio_min_max": [round(min(pairs), 3), round(max(pairs), 3)],
    }
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    emit({"summary": "median output tok/s", **medians, **ratio, **about}, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "cabochon.server.cli", "serve", "--model", args.model, "--port", "0"]
    command += ["--log-level", "warning"]  # standard output is for rows
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next(found[1] for line in server.stdout if (found := re.search(r"ready at +(\S+)", line)))
        asyncio.run(compare(url, args))
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
