"""An engine without a model: output token i is prompt_ids[i % len(prompt_ids)]. For tests of the server.

It paces its tokens, breaks and refuses on demand, and otherwise keeps the contract of engine.py. To it an
adapter is any path without the word "bad".
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from cabochon.engine.admission import check_request
from cabochon.engine.engine import Engine
from cabochon.engine.errors import Aborted, BadAdapter, EngineDead, EngineError, UnknownAdapter
from cabochon.engine.messages import (
    AdapterInfo,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    RequestOutput,
    StepOutput,
    TokenLogprobs,
)

FAKE_INFO = EngineInfo(
    model="fake",
    architecture="FakeForCausalLM",
    model_dir="",
    dtype="fp32",
    device="none",
    attention_backend="none",
    vocab_size=1024,
    max_model_len=1024,
    max_seqs=64,
    eos_token_ids=[1],
    page_tokens=16,
    num_pages=1024,
    num_groups=2,
    kv_bytes=0,
    weight_bytes=0,
    load_s=0.0,
)


def fake_logprobs(token_id: int, count: int) -> TokenLogprobs:
    """−token / 1000; the likeliest are the token itself and its successors."""
    return TokenLogprobs(
        -token_id / 1000, [token_id + i for i in range(count)], [-(token_id + i) / 1000 for i in range(count)]
    )


@dataclass(slots=True, kw_only=True)
class FakeFaults:
    """What goes wrong, and when. Tests change the fields at any time."""

    delay_s: float = 0.0  # before each step
    tokens_per_step: int = 1  # of each request
    cached_tokens: int = 0  # what every output says of its prompt
    dies_after_tokens: int | None = None  # the engine dies when it has made that many
    refuses: EngineError | None = None  # every request ends with it
    fails_after_tokens: dict[int, EngineError] = field(default_factory=dict)  # by tokens of one request
    is_paused: bool = False  # no step happens
    load_s: float = 0.0  # of an adapter


class FakeEngine(Engine):
    """Runs in the event loop of its caller; each request is a stream of its own."""

    def __init__(self, info: EngineInfo = FAKE_INFO, faults: FakeFaults | None = None) -> None:
        self._info = info
        self.faults = faults or FakeFaults()
        self.open: dict[str, GenerateRequest] = {}
        self.aborted: list[str] = []
        self.published: list[str] = []
        self.seen: list[GenerateRequest] = []
        self.adapters = {adapter.name: adapter for adapter in info.adapters}
        self.snapshot = EngineStats(pages_total=info.num_pages)
        self._dead_reason: str | None = None
        self._changed = asyncio.Event()  # wakes streams that sleep between tokens
        self._on_step: list[Callable[[StepOutput], None]] = []
        self._num_generated = 0

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        self.seen.append(request)
        if self._dead_reason is None:
            if request.adapter is not None and request.adapter not in self.adapters:
                return _refused(_unknown_adapter(request.adapter))
            self.open[request.request_id] = request
        return self._stream(request)

    def publish(self, request_id: str) -> None:
        self.published.append(request_id)

    def abort(self, request_id: str) -> None:
        if self.open.pop(request_id, None) is not None:
            self.aborted.append(request_id)
            self._wake()

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> AdapterInfo:
        await asyncio.sleep(self.faults.load_s)
        if self._dead_reason is not None:
            raise EngineDead(self._dead_reason)
        if self._info.max_loras == 0 or "bad" in path or (name in self.adapters and not replace):
            raise BadAdapter("an adapter must be readable and new, this one is not: choose another")
        self.adapters[name] = AdapterInfo(name=name, path=path, rank=8, num_bytes=4096, base_model=None)
        return self.adapters[name]

    async def unload_adapter(self, name: str) -> None:
        if self._dead_reason is not None:
            raise EngineDead(self._dead_reason)
        if self.adapters.pop(name, None) is None:
            raise _unknown_adapter(name)

    def stats(self) -> EngineStats:
        return replace(self.snapshot, running=len(self.open))

    def on_step(self, listener: Callable[[StepOutput], None]) -> None:
        self._on_step.append(listener)

    def dead_reason(self) -> str | None:
        return self._dead_reason

    def die(self, reason: str = "the engine process ended, exit code -9: restart the server") -> None:
        """End every open request with EngineDead."""
        self._dead_reason = self._dead_reason or reason
        self.open.clear()
        self._wake()

    async def shutdown(self) -> None:
        self.die("the engine was shut down")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _stream(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        try:
            max_tokens = self._check(request)
            scheduled_s = time.monotonic()
            first_token_s = 0.0
            made = 0
            while True:
                await self._next_step(request.request_id)
                output = self._tokens(request, made, max_tokens)
                made += len(output.token_ids)
                first_token_s = first_token_s or time.monotonic()
                output.scheduled_s, output.first_token_s = scheduled_s, first_token_s
                if made in self.faults.fails_after_tokens:
                    raise self.faults.fails_after_tokens[made]
                self._count(output)
                if output.finish_reason is not None:
                    self.open.pop(request.request_id, None)
                yield output
                if output.finish_reason is not None:
                    return
        except GeneratorExit:
            self.abort(request.request_id)
            raise
        except Exception:
            self.open.pop(request.request_id, None)
            raise

    def _check(self, request: GenerateRequest) -> int:
        if self._dead_reason is not None:
            raise EngineDead(self._dead_reason)
        if self.faults.refuses is not None:
            raise self.faults.refuses
        return check_request(
            request, max_model_len=self._info.max_model_len, vocab_size=self._info.vocab_size
        )

    async def _next_step(self, request_id: str) -> None:
        """Wait for the delay, and while paused. Raises Aborted if that happened."""
        end_s = time.monotonic() + self.faults.delay_s
        while True:
            if self._dead_reason is not None:
                raise EngineDead(self._dead_reason)
            if request_id not in self.open:
                raise Aborted(f"request {request_id} was aborted")
            is_waiting = self.faults.is_paused
            rest_s = 0.02 if is_waiting else end_s - time.monotonic()
            if not is_waiting and rest_s <= 0:
                await asyncio.sleep(0)
                return
            changed = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait([changed], timeout=rest_s)
            changed.cancel()

    def _tokens(self, request: GenerateRequest, made: int, max_tokens: int) -> RequestOutput:
        params, prompt = request.params, request.prompt_ids
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else self._info.eos_token_ids)}
        output = RequestOutput(
            request_id=request.request_id, token_ids=[], cached_tokens=self.faults.cached_tokens
        )
        for index in range(made, min(made + self.faults.tokens_per_step, max_tokens)):
            token_id = prompt[index % len(prompt)]
            output.token_ids.append(token_id)
            if params.logprobs is not None:
                output.logprobs = [*(output.logprobs or ()), fake_logprobs(token_id, params.logprobs)]
            if token_id in stop_ids and index >= params.min_tokens:
                output.finish_reason, output.stop_token_id = "stop", token_id
                return output
        if made == 0 and params.prompt_logprobs is not None:
            output.prompt_logprobs = [fake_logprobs(one, params.prompt_logprobs) for one in prompt[1:]]
        if made + len(output.token_ids) >= max_tokens:
            output.finish_reason = "length"
        return output

    def _count(self, output: RequestOutput) -> None:
        num_tokens = len(output.token_ids)
        self._num_generated += num_tokens
        self.snapshot = replace(
            self.snapshot,
            steps=self.snapshot.steps + 1,
            step_tokens=num_tokens,
            generation_tokens=self._num_generated,
        )
        for listener in self._on_step:
            listener(StepOutput(outputs=[output], stats=self.snapshot))
        limit = self.faults.dies_after_tokens
        if limit is not None and self._num_generated >= limit:
            self.die()


async def _refused(error: EngineError) -> AsyncIterator[RequestOutput]:
    raise error
    yield  # an iterator, as of any request


def _unknown_adapter(name: str) -> UnknownAdapter:
    return UnknownAdapter(f"adapter must be loaded, {name} is not: load it", "model")
