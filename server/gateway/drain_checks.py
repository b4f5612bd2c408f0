"""An orderly end: health says 503 first, requests that are already on their way are served, streams finish.

The process ends in it, so that it only happens when its id is given.
"""

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from cabochon.server.gateway.finding import OK, Finding, Result, judge
from cabochon.server.gateway.http_client import Exchange, HttpFailure, Target, ask, exchange
from cabochon.server.gateway.subject import COMPLETIONS, HEALTH, Subject

UNAVAILABLE = 503
RATE_S = 1.0  # of a stream that shows how fast the server is
STREAM_S = 8.0  # how long the open stream should take then
MIN_TOKENS = 8
PROBE_INTERVAL_S = 0.05
REQUEST_INTERVAL_S = 0.5
ANSWER_S = 5.0
PROBES_S = 5.0  # until everybody has probed: KubeRay's period
DRAIN_S = 30.0


class Probe(NamedTuple):
    """When it was sent, in seconds after SIGTERM, and what came back: None is no answer."""

    at_s: float
    status: int | None


class Request(NamedTuple):
    """A new request after SIGTERM."""

    sent_s: float
    answered_s: float
    status: int | None

    @property
    def is_served(self) -> bool:
        """429 is an answer, too."""
        return self.status is not None and self.status < 500


@dataclass
class Drain:
    """What was seen since SIGTERM."""

    probes: list[Probe] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    stream: str | None = None  # how the open one broke
    stream_s: float | None = None  # when it was whole

    @property
    def warned_s(self) -> float | None:
        """When health first said 503."""
        return next((probe.at_s for probe in self.probes if probe.status == UNAVAILABLE), None)

    @property
    def refused(self) -> Request | None:
        """The first that was not served."""
        refused = [request for request in self.requests if not request.is_served]
        return min(refused) if refused else None


async def check_drain(subject: Subject, pid: int) -> list[Finding]:
    """SIGTERM while a stream is open. Raises HttpFailure if that stream does not begin."""
    drain = Drain()
    body = {**subject.long_stream(), "max_tokens": await _tokens(subject)}
    async with exchange(subject.target, "POST", COMPLETIONS, body) as stream:
        first = await stream.next_piece()
        os.kill(pid, signal.SIGTERM)
        start_s = time.monotonic()
        probing = asyncio.create_task(_probe(subject.target, drain, start_s))
        tasks = [
            asyncio.create_task(_read(stream, first or b"", drain, start_s)),
            asyncio.create_task(_requests(subject, drain, start_s)),
        ]
        await asyncio.wait(tasks, timeout=DRAIN_S)
        for task in (probing, *tasks):
            task.cancel()
        await asyncio.gather(probing, *tasks, return_exceptions=True)
    return judge_drain(drain)


def judge_drain(drain: Drain) -> list[Finding]:
    """Order and time of what was seen."""
    warned_s, refused = drain.warned_s, drain.refused
    is_early = refused is not None and (
        warned_s is None or any(at_s > refused.answered_s and status == OK for at_s, status in drain.probes)
    )
    served_s = 0.0
    if warned_s is not None:
        served_s = max([0.0, *(one.sent_s - warned_s for one in drain.requests if one.is_served)])
    times = {
        "health_503_ms": warned_s,
        "refused_ms": refused and refused.sent_s,
        "stream_whole_ms": drain.stream_s,
    }
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
            measured=drain.stream or "not whole"
            if drain.stream_s is None
            else f"whole after {drain.stream_s:.1f} s",
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
            measured=f"served for {served_s:.1f} s after the 503",
            limit=f"{PROBES_S:g} s",
            advice="serve on until every probe has seen the 503 (cabochon: --lame-duck-s), or clients get it",
            otherwise=Result.WARN,
        ),
    ]


async def _tokens(subject: Subject) -> int:
    """As many as this server makes in about STREAM_S: long enough to see, short enough to wait for."""
    num_pieces = 0
    async with exchange(subject.target, "POST", COMPLETIONS, subject.long_stream()) as stream:
        await stream.next_piece()
        with suppress(TimeoutError):
            async with asyncio.timeout(RATE_S):
                async for _ in stream.pieces():
                    num_pieces += 1
    return min(subject.long_tokens, max(MIN_TOKENS, int(num_pieces / RATE_S * STREAM_S)))


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
        with suppress(HttpFailure, TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                status = (await ask(target, "GET", HEALTH, with_key=False)).status
        drain.probes.append(Probe(at_s, status))
        if status is None:
            return
        await asyncio.sleep(PROBE_INTERVAL_S)


async def _requests(subject: Subject, drain: Drain, start_s: float) -> None:
    """One after the other, without waiting, until one is refused or everybody had time to know."""
    async with asyncio.TaskGroup() as group:
        while drain.refused is None:
            group.create_task(_request(subject, drain, start_s))
            await asyncio.sleep(REQUEST_INTERVAL_S)
            now_s = time.monotonic() - start_s
            if drain.warned_s is not None and now_s > drain.warned_s + PROBES_S + REQUEST_INTERVAL_S:
                return


async def _request(subject: Subject, drain: Drain, start_s: float) -> None:
    sent_s, status = time.monotonic() - start_s, None
    with suppress(HttpFailure, TimeoutError):
        async with asyncio.timeout(ANSWER_S):
            status = (await ask(subject.target, "POST", COMPLETIONS, subject.completion("a", 1))).status
    drain.requests.append(Request(sent_s, time.monotonic() - start_s, status))
