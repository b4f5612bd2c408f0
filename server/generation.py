"""From engine outputs to text: one choice each, several merged, aborted when nobody listens any more."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from cabochon.engine.detokenizer import Detokenizer
from cabochon.engine.engine import Engine
from cabochon.engine.messages import FinishReason, GenerateRequest, RequestOutput
from cabochon.server.logprobs import ScoredTokens
from cabochon.server.metrics import Metrics

EndReason = FinishReason | Literal["content_filter"]  # the last: a guard ended the choice


@dataclass(slots=True)
class Delta:
    """What a step added to choice `index`."""

    index: int
    text: str
    num_tokens: int
    cached_tokens: int
    finish_reason: EndReason | None
    scored: ScoredTokens | None = None  # the tokens of `text` (and first of an echoed prompt), if asked for
    is_behind: bool = False  # text of `scored` is still to come, or a stop string has cut it off


@dataclass(slots=True)
class Choice:
    """One engine request and the text it becomes."""

    index: int
    request: GenerateRequest
    detokenizer: Detokenizer
    is_echo_only: bool = False  # max_tokens is 0: the one token that the engine makes is not shown
    num_tokens: int = 0
    last_token_s: float = 0.0
    last: RequestOutput | None = None
    finish_reason: EndReason | None = None


Guard = Callable[[Choice, AsyncGenerator[Delta, None]], AsyncGenerator[Delta, None]]


async def run_choices(
    engine: Engine,
    choices: Sequence[Choice],
    metrics: Metrics,
    guard: Guard | None = None,
    started: Callable[[], None] = lambda: None,
) -> AsyncGenerator[Delta, None]:
    """Deltas of all choices as they come. Closing it, or an error of one, aborts them all.

    guard: makes of a choice's own deltas those that may be shown; by closing them it ends that choice alone.
    started: called with every output of the engine, which a guard may hold back.
    """

    def run(choice: Choice) -> AsyncGenerator[Delta, None]:
        deltas = _run(engine, choice, metrics, started)
        return deltas if guard is None else _guarded(choice, guard(choice, deltas))

    if len(choices) == 1:
        async with aclosing(run(choices[0])) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(run(choice)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        except Exception as error:  # handed to the one border that answers
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _guarded(choice: Choice, shown: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    async with aclosing(shown):
        async for delta in shown:
            if delta.finish_reason == "content_filter":
                choice.finish_reason = delta.finish_reason
            yield delta


async def _run(
    engine: Engine, choice: Choice, metrics: Metrics, started: Callable[[], None]
) -> AsyncGenerator[Delta, None]:
    request = choice.request
    is_finished = is_counted = False
    try:
        async for output in engine.submit(request):
            started()
            now = time.monotonic()
            metrics.observe_output(output, request, choice.last_token_s, now)
            choice.last_token_s, choice.last = now, output
            choice.num_tokens += len(output.token_ids)
            delta = _delta(choice, output)
            if delta.finish_reason is not None:
                is_finished, is_counted = output.finish_reason is not None, True
                choice.finish_reason = delta.finish_reason
                metrics.observe_end(request, output, choice.num_tokens, delta.finish_reason, now)
            yield delta
            if delta.finish_reason is not None:
                return
    except Exception:
        is_counted = True
        metrics.count_end("error")
        raise
    finally:
        if not is_finished:  # a stop string, an error on the way, or nobody listens
            engine.abort(request.request_id)
        if not is_counted:
            metrics.count_end("abort")


def _delta(choice: Choice, output: RequestOutput) -> Delta:
    """A stop token's own text is shown only where a stop string's is."""
    detokenizer = choice.detokenizer
    is_hidden = output.stop_token_id is not None and not detokenizer.includes_stop
    shown = output.token_ids[:-1] if is_hidden else output.token_ids
    text = detokenizer.feed(shown)
    finish_reason: EndReason | None = output.finish_reason
    if finish_reason is not None:
        text += detokenizer.flush()
    if detokenizer.stop_string is not None:
        finish_reason = "stop"
    scored = _scored(choice, output, 0 if choice.is_echo_only else len(shown))
    if choice.is_echo_only:
        return Delta(choice.index, "", 0, output.cached_tokens, "length", scored)
    num_tokens, is_behind = len(output.token_ids), scored is not None and detokenizer.is_behind
    return Delta(choice.index, text, num_tokens, output.cached_tokens, finish_reason, scored, is_behind)


def _scored(choice: Choice, output: RequestOutput, num_shown: int) -> ScoredTokens | None:
    if output.logprobs is None and output.prompt_logprobs is None:
        return None
    scored = ScoredTokens()
    if output.prompt_logprobs is not None:
        scored.extend(choice.request.prompt_ids, [None, *output.prompt_logprobs])
    if output.logprobs is not None:
        scored.extend(output.token_ids[:num_shown], output.logprobs[:num_shown])
    return scored
