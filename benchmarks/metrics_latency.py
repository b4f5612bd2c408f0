"""How fast `/metrics` answers 20 times a second while every slot is busy and long prompts are computed.

    python benchmarks/metrics_latency.py --engine-cores 1 --seconds 30 --rounds 3 --out FILE     # [--ray]

All slots but one hold streams; the last one has a new long prompt again and again. With --engine-cores 1 the
engine is kept on one core (target p99 < 5 ms), else it may use as many threads as there are cores (< 50 ms).
`cpu_us_per_scrape` is the CPU of the whole server process for a scrape of an idle server, less what it uses
without any: target < 1 ms. A row is a round; look at `prefill_s`, which should be about 2.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path

import psutil
from http_servers import Server, cabochon_serve, cpu_s, free_port, on_ray, stream
from offline import emit, environment

INTERVAL_S = 0.05
IDLE_SCRAPES = 1000
SETTLE_S = 2.0
NUMBERS = itertools.count()


class Scraper:
    """One connection, as a picker keeps it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def latency_s(self) -> float:
        """From sending to the last byte. Raises AssertionError if it is no 200."""
        started_s = time.perf_counter()
        self._writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        await self._reader.readexactly(length)
        return time.perf_counter() - started_s


def pin(process: psutil.Process, cores: set[int]) -> None:
    """All threads that there are; new ones inherit it."""
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


async def keep_busy(port: int, prompt_words: int, output_tokens: int, firsts_s: list[float]) -> None:
    """One slot, until it is cancelled; times to first token of the streams that ended."""
    while True:
        prompt = f"{next(NUMBERS)}:" + " opal" * prompt_words
        firsts_s.append((await stream(port, prompt, output_tokens)).first_s)


async def under_load(server: Server, args: argparse.Namespace) -> dict[str, object]:
    firsts_s: list[float] = []
    tasks = [asyncio.create_task(keep_busy(server.port, 8, 400, [])) for _ in range(args.slots - 1)]
    tasks.append(asyncio.create_task(keep_busy(server.port, args.prefill_words, 1, firsts_s)))
    scraper = Scraper(*await asyncio.open_connection("127.0.0.1", server.port))
    await asyncio.sleep(SETTLE_S)
    taken_ms: list[float] = []
    started_s = time.perf_counter()
    for number in range(int(args.seconds / INTERVAL_S)):
        await asyncio.sleep(max(0.0, started_s + number * INTERVAL_S - time.perf_counter()))
        taken_ms.append(await scraper.latency_s() * 1e3)
        assert not any(task.done() for task in tasks), "every slot must stay busy: look at the server"
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    taken_ms.sort()
    return {
        "scrapes": len(taken_ms),
        "p50_ms": round(statistics.median(taken_ms), 2),
        "p99_ms": round(taken_ms[int(len(taken_ms) * 0.99)], 2),
        "max_ms": round(taken_ms[-1], 2),
        "prefill_s": round(statistics.median(firsts_s), 2) if firsts_s else None,
    }


async def idle_cpu_us(server: Server) -> float:
    """CPU of the server process per scrape, without other requests."""
    scraper = Scraper(*await asyncio.open_connection("127.0.0.1", server.port))
    await asyncio.sleep(SETTLE_S)
    before_s, started_s = cpu_s(server.process), time.perf_counter()
    await asyncio.sleep(SETTLE_S)
    rest = (cpu_s(server.process) - before_s) / (time.perf_counter() - started_s)
    before_s, started_s = cpu_s(server.process), time.perf_counter()
    for _ in range(IDLE_SCRAPES):
        await scraper.latency_s()
    used_s = cpu_s(server.process) - before_s - rest * (time.perf_counter() - started_s)
    return round(used_s / IDLE_SCRAPES * 1e6)


def main() -> None:
    args = parse_args()
    cores = sorted(os.sched_getaffinity(0))
    threads = args.engine_cores or len(cores)
    options = {"model": args.model, "max_seqs": args.slots, "threads": threads, "kv_cache_gib": 1.0}
    about = {name: getattr(args, name) for name in ("model", "slots", "prefill_words", "seconds", "ray")}
    about |= {"command": "metrics_latency.py", "engine_cores": threads, **environment()}
    with on_ray(options, free_port()) if args.ray else cabochon_serve(options) as server:
        if args.engine_cores:
            pin(server.engine, set(cores[: args.engine_cores]))
        about["cpu_us_per_scrape"] = asyncio.run(idle_cpu_us(server))
        for number in range(1, args.rounds + 1):
            row = asyncio.run(under_load(server, args))
            emit({"benchmark": "metrics_latency", "round": number, **row, **about}, args.out)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a directory or a Hub id")
    p.add_argument("--slots", type=int, default=16)
    p.add_argument("--prefill-words", type=int, default=2000, help="about a token each")
    p.add_argument("--engine-cores", type=int, default=0, help="0: all")
    p.add_argument("--ray", action="store_true", help="a replica on Ray instead of `cabochon serve`")
    p.add_argument("--seconds", type=float, default=30.0)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
