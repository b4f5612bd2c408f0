"""Sends requests when they are due, and watches itself while it does.

An open loop never waits for answers: a request that a busy client or a full `max_in_flight` sends late keeps
the time at which it was due, so its latency counts the wait (no coordinated omission).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import numpy as np
from load.client import Client, Record
from load.workloads import Ask, Draw, encode
from tqdm import tqdm

BEAT_S = 0.02
BEATS_A_LOOK = 25  # between two looks at all records for the bar
MAX_CPU_SHARE = 0.5  # of one core; above it, queueing for the client's own core shows in the latencies
MAX_LAG_MS = 10.0  # p99 of lateness; a step of a small model takes as long


class Planned(NamedTuple):
    """A request and when it is due, in seconds after the start."""

    at_s: float
    ask: Ask


@dataclass(slots=True)
class Run:
    """All records of a run, in order of sending, and how the client did. Times of time.perf_counter."""

    start_s: float
    window_s: tuple[float, float]  # what is measured: after the warm-up, to the last arrival's time
    records: list[Record] = field(default_factory=list)
    beat_lag_s: list[float] = field(default_factory=list)
    cpu_share: float = 0.0  # of one core, whole run

    def client(self) -> dict[str, float]:
        """How late it sent (open loop), how late it woke, and what it used."""
        sent = [one.sent_s - one.scheduled_s for one in self.records]
        return {
            "client_cpu_share": round(self.cpu_share, 3),
            "client_send_lag_p99_ms": _p99_ms(sent),
            "client_wake_lag_p99_ms": _p99_ms(self.beat_lag_s),
        }

    def warnings(self, *, is_bounded: bool = False) -> list[str]:
        """Why its figures may be the client's, not the server's. is_bounded: it was told to send late."""
        found, said = self.client(), []
        if found["client_cpu_share"] > MAX_CPU_SHARE:
            said.append(
                f"the client used {found['client_cpu_share']:.0%} of a core: share the load among several"
            )
        if found["client_wake_lag_p99_ms"] > MAX_LAG_MS:
            lag = found["client_wake_lag_p99_ms"]
            said.append(
                f"the client woke {lag:g} ms late (p99): it waits for a core, run it on another machine"
            )
        elif found["client_send_lag_p99_ms"] > MAX_LAG_MS and not is_bounded:
            said.append(
                f"the client sent {found['client_send_lag_p99_ms']:g} ms late (p99): it cannot keep up"
            )
        return said


async def open_loop(
    client: Client,
    plan: Sequence[Planned],
    *,
    warmup_s: float,
    duration_s: float,
    max_in_flight: int | None = None,
    at_window: Callable[[], Awaitable[None]] | None = None,
) -> Run:
    """Send each request of `plan` when it is due, and wait for all answers.

    at_window: called when the warm-up is over. What is due before is sent and recorded, too.
    """
    contents = [encode(planned.ask) for planned in plan]
    slots = asyncio.Semaphore(max_in_flight) if max_in_flight else contextlib.nullcontext()
    async with _watched(warmup_s, duration_s, len(plan), at_window) as (run, bar):

        async def one(ask: Ask, content: bytes, record: Record) -> None:
            async with slots:
                await client.stream(ask.path, content, record)
            bar.update()

        async with asyncio.TaskGroup() as group:
            for (at_s, ask), content in zip(plan, contents, strict=True):
                due_s = run.start_s + at_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                while (
                    rest_s := due_s - time.perf_counter()
                ) > 0:  # timers have a millisecond: some are early
                    await asyncio.sleep(rest_s)
                record = Record(ask.kind, due_s)
                run.records.append(record)
                group.create_task(one(ask, content, record))
    return run


async def closed_loop(
    client: Client,
    draw: Draw,
    rng: np.random.Generator,
    concurrency: int,
    *,
    warmup_s: float,
    duration_s: float,
    at_window: Callable[[], Awaitable[None]] | None = None,
) -> Run:
    """`concurrency` clients, each sends its next request when its last has ended, until the time is up."""
    async with _watched(warmup_s, duration_s, None, at_window) as (run, bar):

        async def one() -> None:
            while time.perf_counter() < run.window_s[1]:
                ask = draw(rng)
                content = encode(ask)
                record = Record(ask.kind, time.perf_counter())
                run.records.append(record)
                await client.stream(ask.path, content, record)
                bar.update()
                if record.error:
                    await asyncio.sleep(BEAT_S)  # a server that refuses is not asked in a busy loop

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one())
    return run


@contextlib.asynccontextmanager
async def _watched(
    warmup_s: float, duration_s: float, total: int | None, at_window: Callable[[], Awaitable[None]] | None
) -> AsyncIterator[tuple[Run, "tqdm[NoReturn]"]]:
    """A run under way: its bar, its heartbeat and its CPU time."""
    start_s, cpu_s = time.perf_counter(), time.process_time()
    run = Run(start_s, (start_s + warmup_s, start_s + warmup_s + duration_s))
    with tqdm(total=total, unit="req", disable=None, leave=False) as bar:
        tasks = [asyncio.create_task(_beat(run, bar))]
        if at_window is not None:
            tasks.append(asyncio.create_task(_later(warmup_s, at_window)))
        try:
            yield run, bar
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    run.cpu_share = (time.process_time() - cpu_s) / (time.perf_counter() - start_s)


async def _beat(run: Run, bar: "tqdm[NoReturn]") -> None:
    while True:
        due_s = time.perf_counter() + BEAT_S
        await asyncio.sleep(BEAT_S)
        run.beat_lag_s.append(time.perf_counter() - due_s)
        if not bar.disable and len(run.beat_lag_s) % BEATS_A_LOOK == 0:
            failed = sum(one.error is not None for one in run.records)
            bar.set_postfix_str(f"{len(run.records) - bar.n} open, {failed} failed", refresh=False)


async def _later(delay_s: float, then: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(delay_s)
    await then()


def _p99_ms(values_s: Sequence[float]) -> float:
    return round(float(np.percentile(values_s, 99)) * 1000, 2) if values_s else 0.0
