"""What Ray costs: one load on `cabochon serve`, on a Serve replica's own port, and through Serve's proxy.

    python benchmarks/ray_overhead.py --streams 16 --rounds 5 --out FILE

Both servers are up, one is loaded at a time; rounds are interleaved, the first of each is a warm-up. A row
is one round: output tokens per second, time to first token, CPU of the process that speaks HTTP, and of Ray's
own processes (without the replica and its engine) as a share of all cores. Ray runs beside the rounds of
`cabochon serve` too, so this share comes on top of the ratio. Target: the replica's throughput is at least
0.95 of `cabochon serve`'s. Run nothing else meanwhile. Three minutes on two cores.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path

import psutil
from http_servers import Server, Timing, cabochon_serve, cpu_s, free_port, on_ray, stream
from offline import emit, environment

WORDS = "Opals are stones of many colours, and each of them asks for a light of its own. " * 2
Arm = tuple[int, Server]  # port to ask, who answers there


def rays_own(server: Server) -> list[psutil.Process]:
    """Everything that Ray has started, but the replica and what it has started."""
    ours = {server.process, *server.process.children(recursive=True)}
    return [p for p in (server.parent, *server.parent.children(recursive=True)) if p not in ours]


def name_of(process: psutil.Process) -> str:
    """raylet, gcs_server, ray::ServeController, dashboard, ...: short, without its arguments."""
    first, *rest = process.cmdline() or [process.name()]
    script = next((part for part in rest if part.endswith(".py")), first)
    return Path(script if "python" in Path(first).name else first).stem.split(" ")[0]


async def load(port: int, args: argparse.Namespace, nonce: int) -> tuple[list[Timing], float]:
    """All streams at once, each client one after the other. Timings, and seconds until the last has ended."""

    async def client(index: int) -> list[Timing]:
        prompts = [f"{nonce}-{index}-{number}: {WORDS}" for number in range(args.requests)]
        return [await stream(port, prompt, args.output_tokens) for prompt in prompts]

    started_s = time.perf_counter()
    timings = await asyncio.gather(*(client(index) for index in range(args.streams)))
    return [one for client in timings for one in client], time.perf_counter() - started_s


def measure(arm: Arm, ray: list[psutil.Process], args: argparse.Namespace, nonce: int) -> dict[str, float]:
    port, server = arm
    watched = [server.process, server.engine, *ray]
    before = [cpu_s(process) for process in watched]
    timings, wall_s = asyncio.run(load(port, args, nonce))
    used_s = [cpu_s(process) - earlier for process, earlier in zip(watched, before, strict=True)]
    tokens = args.streams * args.requests * args.output_tokens
    first_ms = sorted(one.first_s * 1e3 for one in timings)
    shares: Counter[str] = Counter()
    for process, seconds in zip(ray, used_s[2:], strict=True):
        shares[name_of(process)] += seconds / wall_s / len(os.sched_getaffinity(0))
    row: dict[str, float] = {
        "output_tok_per_s": round(tokens / wall_s, 1),
        "ttft_p50_ms": round(statistics.median(first_ms), 1),
        "ttft_p90_ms": round(first_ms[int(len(first_ms) * 0.9)], 1),
        "server_us_per_token": round(used_s[0] / tokens * 1e6),
        "engine_cpu_share": round(used_s[1] / wall_s / len(os.sched_getaffinity(0)), 3),
        "ray_cpu_share": round(sum(shares.values()), 3),
    }
    print(json.dumps({name: round(share, 4) for name, share in shares.most_common() if share > 0.0005}))
    return row


def main() -> None:
    args = parse_args()
    about = {
        name: getattr(args, name) for name in ("model", "streams", "requests", "output_tokens", "threads")
    }
    about |= {"command": "ray_overhead.py", **environment()}
    options = {"model": args.model, "threads": args.threads, "max_seqs": args.streams, "kv_cache_gib": 0.5}
    proxy_port = free_port()
    with cabochon_serve(options) as plain, on_ray(options, proxy_port) as replica:
        ray = rays_own(replica)
        arms: dict[str, Arm] = {
            "cabochon serve": (plain.port, plain),
            "replica": (replica.port, replica),
            "serve proxy": (proxy_port, replica),
        }
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for number in range(args.rounds + 1):
            for place, (name, arm) in enumerate(arms.items()):
                row = measure(arm, ray, args, number * len(arms) + place)
                if number:
                    rows[name].append(row)
                    emit({"arm": name, "round": number, **row, **about}, args.out)
    summarize(rows, about, args.out)


def summarize(rows: dict[str, list[dict[str, float]]], about: dict[str, object], out: Path | None) -> None:
    """Medians of each arm, and ratios to `cabochon serve` round by round."""
    for name, measured in rows.items():
        medians = {f"median_{key}": statistics.median(row[key] for row in measured) for key in measured[0]}
        ratios: dict[str, object] = {}
        for key in ("output_tok_per_s", "ttft_p50_ms"):
            pairs = [row[key] / base[key] for row, base in zip(measured, rows["cabochon serve"], strict=True)]
            ratios[f"{key}_ratio"] = round(statistics.median(pairs), 3)
            ratios[f"{key}_ratio_min_max"] = [round(min(pairs), 3), round(max(pairs), 3)]
        emit({"summary": name, "rounds": len(measured), **medians, **ratios, **about}, out)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a directory or a Hub id")
    p.add_argument("--streams", type=int, default=16)
    p.add_argument("--requests", type=int, default=2, help="of each stream, one after the other")
    p.add_argument("--output-tokens", type=int, default=24)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()
