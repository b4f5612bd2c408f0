"""An orderly end: health says 503 first, requests that are already on their way are served, streams finish.

The process ends in it, so that it only happens when its id is given.
"""

import asyncio
import os
import signal
import time
from dataclasses import dataclass, field

from cabochon.server.gateway.finding import OK, Finding, Result, judge
from cabochon.server.gateway.http_client import Exchange, HttpFailure, Target, ask, exchange
from cabochon.server.gateway.subject import COMPLETIONS, HEALTH, Subject

UNAVAILABLE = 503
PROBE_INTERVAL_S = 0.05
REQUEST_INTERVAL_S = 0.2
ANSWER_S = 5.0
PROBES_S = 5.0  # until everybody has probed: KubeRay's period
DRAIN_S = 30.0


@dataclass
class Drain:
    """What was seen since SIGTERM, in seconds after it. A status of None: no connection or no answer."""

    probes: list[tuple[float, int | None]] = field(default_factory=list)
    requests: list[tuple[float, int | None]] = field(default_factory=list)  # by the time they were sent
    stream: str | None = None  # how the open one broke
    stream_s: float | None = None  # when it was whole

    @property
    def warned_s(self) -> float | None:
        """When health first said 503."""
        return next((at_s for at_s, status in self.probes if status == UNAVAILABLE), None)

    @property
    def refused_s(self) -> float | None:
        """When the first request was sent that was not served."""
        return next((at_s for at_s, status in self.requests if status is None or status >= 500), None)


async def check_drain(subject: Subject, pid: int) -> list[Finding]:
    """SIGTERM while a stream is open. Raises HttpFailure if that stream does not begin."""
    drain = Drain()
    async with exchange(subject.target, "POST", COMPLETIONS, subject.long_stream()) as stream:
        first = await stream.next_piece()
        os.kill(pid, signal.SIGTERM)
        start_s = time.monotonic()
        probing = asyncio.create_task(_probe(subject.target, drain, start_s))
        tasks = [
            asyncio.create_task(_read(stream, first or b"", drain, start_s)),
            asyncio.create_task(_request(subject, drain, start_s)),
        ]
        await asyncio.wait(tasks, timeout=DRAIN_S)
        for task in (probing, *tasks):
            task.cancel()
        await asyncio.gather(probing, *tasks, return_exceptions=True)
    return judge_drain(drain)


def judge_drain(drain: Drain) -> list[Finding]:
    """Order and time of what was seen."""
    warned_s, refused_s = drain.warned_s, drain.refused_s
    is_early = refused_s is not None and (
        warned_s is None or any(at_s > refused_s and status == OK for at_s, status in drain.probes)
    )
    served_s = 0.0
    if warned_s is not None and drain.requests:
        last_s = refused_s if refused_s is not None else drain.requests[-1][0]
        served_s = max(0.0, last_s - warned_s)
    times = {"health_503_ms": warned_s, "refused_ms": refused_s, "stream_whole_ms": drain.stream_s}
    return [
        judge(
            "drain.health",
            warned_s is not None,
            measured="never 503" if warned_s is None else f"503 after {warned_s * 1000:.0f} ms",
            limit="503 while the port is open",
            advice="answer /health with 503 from SIGTERM on: it is how load balancers learn of the end",
            numbers={name: round(at_s * 1000) for name, at_s in times.items() if at_s is not None},
        ),
        judge(
            "drain.stream",
            drain.stream_s is not None,
            measured=f"whole after {drain.stream_s:.1f} s" if drain.stream_s else drain.stream or "not whole",
            limit=f"whole within {DRAIN_S:g} s",
            advice="let open requests finish before the process ends, and give it the time to",
        ),
        judge(
            "drain.requests",
            not is_early,
            measured="refused before health said 503" if is_early else "none refused before the 503",
            limit="served until health is 503",
            advice="refuse only after health has said 503: the picker sends requests until it knows",
        ),
        judge(
            "drain.lame_duck",
            served_s >= PROBES_S,
            measured=f"requests served for {served_s:.1f} s",
            limit=f"{PROBES_S:g} s after the 503",
            advice="serve on until every probe has seen the 503 (cabochon: --lame-duck-s), or clients get it",
            otherwise=Result.WARN,
        ),
    ]


async def _read(stream: Exchange, tail: bytes, drain: Drain, start_s: float) -> None:
    try:
        async for piece in stream.pieces():
            tail = piece
    except HttpFailure as error:
        drain.stream = str(error)
        return
    if tail.endswith(b"data: [DONE]\n\n"):
        drain.stream_s = time.monotonic() - start_s
    else:
        drain.stream = "ended without [DONE]"


async def _probe(target: Target, drain: Drain, start_s: float) -> None:
    """Until the port is closed."""
    while True:
        at_s, status = time.monotonic() - start_s, None
        try:
            async with asyncio.timeout(ANSWER_S):
                status = (await ask(target, "GET", HEALTH, with_key=False)).status
        except (HttpFailure, TimeoutError):
            return
        finally:
            drain.probes.append((at_s, status))
        await asyncio.sleep(PROBE_INTERVAL_S)


async def _request(subject: Subject, drain: Drain, start_s: float) -> None:
    """Until one is refused, or everybody had time to know."""
    at_s = 0.0
    while drain.refused_s is None and (drain.warned_s is None or at_s < drain.warned_s + PROBES_S):
        at_s, status = time.monotonic() - start_s, None
        try:
            async with asyncio.timeout(ANSWER_S):
                status = (await ask(subject.target, "POST", COMPLETIONS, subject.completion("a", 1))).status
        except (HttpFailure, TimeoutError):
            pass
        drain.requests.append((at_s, status))
        await asyncio.sleep(REQUEST_INTERVAL_S)
