"""The server at work: /metrics twenty times a second while streams run, and a client that goes away."""

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from cabochon.server.gateway.endpoint_metrics import EndpointMetrics
from cabochon.server.gateway.finding import OK, Finding, Result, judge, skip
from cabochon.server.gateway.http_client import Connection, HttpFailure, ask, exchange
from cabochon.server.gateway.scheduling import STALE_S
from cabochon.server.gateway.subject import COMPLETIONS, HEALTH, Subject, is_idle, read_metrics, wait_until

SCRAPE_INTERVAL_S = 0.05  # the picker's default, and its least
SCRAPE_TIMEOUT_S = 1.0
PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 2.0  # of GKE's load balancer and of KubeRay
GOOD_S = 0.05
FREED_S = 0.25  # what the picker allows for memory to come back after it evicted a request
WAIT_S = 3.0
TOO_MANY = 429
RETRY_S = 0.1


@dataclass
class Load:
    """What was seen while the streams ran."""

    scrapes_s: list[float] = field(default_factory=list)
    metrics: list[EndpointMetrics] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of scrapes
    probes: list[int | None] = field(default_factory=list)  # statuses of /health; None: no answer in time
    num_answers: int = 0
    num_refused: int = 0  # 429
    broken: list[str] = field(default_factory=list)  # streams that ended otherwise


async def check_load(subject: Subject) -> list[Finding]:
    """Streams for `seconds`; they are cut off at the end."""
    load = Load()
    tasks = [asyncio.create_task(_streams(subject, load)) for _ in range(subject.concurrency)]
    async with Connection(subject.target) as scraper:
        tasks.append(asyncio.create_task(_every(SCRAPE_INTERVAL_S, lambda: _scrape(scraper, load))))
        tasks.append(asyncio.create_task(_every(PROBE_INTERVAL_S, lambda: _probe(subject, load))))
        done, _ = await asyncio.wait(tasks, timeout=subject.seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:  # each runs for ever, so this one has a bug
        task.result()
    return judge_load(load, subject.concurrency)


def judge_load(load: Load, num_streams: int) -> list[Finding]:
    """Latency, freshness, gauges that move, health and answers."""
    running = max((metrics.running for metrics in load.metrics), default=0)
    usage = max((metrics.kv_usage for metrics in load.metrics), default=0.0)
    probes = [probe for probe in load.probes if probe == OK]
    return [
        *_latency(load),
        judge(
            "load.running",
            running > 0,
            measured=f"at most {running}",
            limit=f"> 0 with {num_streams} streams",
            advice="refresh the gauge while requests run: the picker believes that the server is idle",
        ),
        judge(
            "load.kv",
            usage > 0,
            measured=f"at most {usage:.3f}",
            limit="> 0 while streams run",
            advice="count the pages of live requests: kv-cache-utilization-scorer sees no difference",
            otherwise=Result.WARN,
        ),
        judge(
            "load.health",
            len(probes) == len(load.probes) > 0,
            measured=f"{len(probes)} of {len(load.probes)} probes 200",
            limit=f"200 within {PROBE_TIMEOUT_S:g} s",
            advice="answer /health outside the queue of requests: a late probe empties the pool",
        ),
        judge(
            "load.answers",
            not load.broken and load.num_answers > 0,
            measured=load.broken[0]
            if load.broken
            else f"{load.num_answers} streams, {load.num_refused} × 429",
            limit="no end but whole or 429",
            advice="refuse with 429 what is too much: the client sees what the server answers",
        ),
    ]


async def check_disconnect(subject: Subject) -> list[Finding]:
    """A client leaves in the middle of its stream. Raises HttpFailure."""
    limit = f"freed within {FREED_S * 1000:.0f} ms"
    async with Connection(subject.target) as scraper:
        if await wait_until(scraper, is_idle, WAIT_S) is None:
            return [skip("client.disconnect", "others use the server", limit)]
        async with exchange(subject.target, "POST", COMPLETIONS, subject.long_stream()) as stream:
            await stream.next_piece()
            seen_s = await wait_until(scraper, lambda metrics: not is_idle(metrics), WAIT_S / 2)
        if seen_s is None:
            return [skip("client.disconnect", f"the stream (status {stream.status}) was not seen", limit)]
        freed_s = await wait_until(scraper, is_idle, WAIT_S)
    took = f"after {freed_s * 1000:.0f} ms" if freed_s is not None else f"not within {WAIT_S:g} s"
    finding = judge(
        "client.disconnect",
        freed_s is not None and freed_s <= FREED_S,
        measured=f"slot free {took}",
        limit=limit,
        advice="abort a request when its connection closes: the picker evicts by closing it",
        otherwise=Result.FAIL if freed_s is None else Result.WARN,
        numbers={"freed_ms": round(freed_s * 1000)} if freed_s is not None else {},
    )
    return [finding]


def _latency(load: Load) -> list[Finding]:
    times_s = sorted(load.scrapes_s)
    if load.failures or len(times_s) < 2:
        first = f"{len(load.failures)} failed: {load.failures[0]}" if load.failures else "no scrape"
        advice = "answer every scrape: the server counts as full once its values are stale"
        limit = f"all within {SCRAPE_TIMEOUT_S:g} s"
        return [judge("load.latency", False, measured=first, limit=limit, advice=advice)]
    p50_s, p99_s = statistics.median(times_s), times_s[math.ceil(0.99 * len(times_s)) - 1]
    oldest_s = SCRAPE_INTERVAL_S + times_s[-1]
    numbers = {"p50_ms": p50_s * 1000, "p99_ms": p99_s * 1000, "max_ms": times_s[-1] * 1000}
    advice = "render /metrics from a snapshot, outside the queue of requests, and let no step hold it up"
    return [
        judge(
            "load.latency",
            p99_s <= GOOD_S,
            measured=f"p50 {p50_s * 1000:.1f} ms, p99 {p99_s * 1000:.1f} ms of {len(times_s)}",
            limit=f"p99 ≤ {GOOD_S * 1000:.0f} ms",
            advice=advice,
            otherwise=Result.FAIL if SCRAPE_INTERVAL_S + p99_s > STALE_S else Result.WARN,
            numbers={name: round(value, 2) for name, value in numbers.items()},
        ),
        judge(
            "load.fresh",
            oldest_s <= STALE_S,
            measured=f"values at most {oldest_s * 1000:.0f} ms old",
            limit=f"{STALE_S * 1000:.0f} ms",
            advice="as load.latency: while values are older the server counts as full",
            otherwise=Result.WARN,
        ),
    ]


async def _streams(subject: Subject, load: Load) -> None:
    """One stream after the other, for ever."""
    while True:
        try:
            async with exchange(subject.target, "POST", COMPLETIONS, subject.long_stream()) as stream:
                load.num_answers += 1
                if stream.status == TOO_MANY:
                    load.num_refused += 1
                elif stream.status != OK:
                    load.broken.append(f"a stream got {stream.status}")
                async for _ in stream.pieces():
                    pass
            is_refused = stream.status != OK
        except HttpFailure as error:
            load.broken.append(str(error))
            is_refused = True
        if is_refused:
            await asyncio.sleep(RETRY_S)


async def _scrape(connection: Connection, load: Load) -> None:
    start_s = time.perf_counter()
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S):
            metrics = await read_metrics(connection)
    except (HttpFailure, TimeoutError) as error:
        connection.close()
        load.failures.append(str(error) or f"no answer in {SCRAPE_TIMEOUT_S:g} s")
        return
    load.scrapes_s.append(time.perf_counter() - start_s)
    load.metrics.append(metrics)


async def _probe(subject: Subject, load: Load) -> None:
    status = None
    with suppress(HttpFailure, TimeoutError):
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            status = (await ask(subject.target, "GET", HEALTH, with_key=False)).status
    load.probes.append(status)


async def _every(interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """At each multiple of the interval; one that is missed is left out, as Go's ticker does."""
    start_s = time.monotonic()
    while True:
        await work()
        ticks = math.floor((time.monotonic() - start_s) / interval_s) + 1
        await asyncio.sleep(start_s + ticks * interval_s - time.monotonic())
