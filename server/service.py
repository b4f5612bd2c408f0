"""What the routes share: from a parsed body to engine requests, and from their text to an answer."""

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from starlette.requests import Request

from cabochon.engine.admission import check_request
from cabochon.engine.detokenizer import Detokenizer
from cabochon.engine.engine import Engine
from cabochon.engine.errors import BadPrompt, BadSampling, RequestError
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import MAX_SEED
from cabochon.server.adapters import Adapters
from cabochon.server.armor.prompt_texts import PromptTexts, chat_texts, completion_texts
from cabochon.server.config import ServerConfig
from cabochon.server.errors import ApiError, as_api_error
from cabochon.server.formats import Answer, ChatAnswer, CompletionAnswer, Head, Usage
from cabochon.server.generation import Choice, Delta, run_choices
from cabochon.server.lifecycle import Lifecycle
from cabochon.server.metrics import Metrics
from cabochon.server.prompts import Prompts
from cabochon.server.protocol import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    SamplingFields,
)
from cabochon.server.response_events import ResponseAnswer
from cabochon.server.responses import ResponsesRequest, in_our_words
from cabochon.server.sampling import sampling_params
from cabochon.server.streaming import EventStream, JsonResponse, or_disconnect

if TYPE_CHECKING:
    from cabochon.server.armor.gate import Gate, RequestGuard
    from cabochon.server.spans import Trace, Tracing

VERSION = version("cabochon")
T = TypeVar("T")
Body = TypeVar("Body", bound=GenerationRequest)
MAX_LISTED = 32  # names in an error


@dataclass(frozen=True, slots=True)
class Job:
    """A body, ready to run."""

    choices: list[Choice]
    answer: Answer
    head: Head
    prompts_of: list[int]  # per choice, which prompt it continues
    is_stream: bool
    guard: "RequestGuard | None" = None
    echo: Sequence[str] = ()  # what the answer shows of prompts


class Service:
    """One served model: engine, tokenizer, names, adapters, metrics and lifecycle."""

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        config: ServerConfig,
        *,
        lora_dir: str | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        """lora_dir: adapters below it may be loaded over HTTP. tracing: where spans go, closed by others.

        `gate`, set by whoever starts a guard, makes every prompt and answer wait for its check.
        """
        self.gate: Gate | None = None
        self.engine = engine
        self.prompts = prompts
        self.config = config
        self.tracing = tracing
        self.names = config.served_model_name or (engine.info.model,)
        self.adapters = Adapters(engine, self.names, lora_dir)
        self.metrics = Metrics(engine, self.names[0])
        self.lifecycle = Lifecycle(engine, config)
        self.started = int(time.time())
        quantized = "" if engine.info.quantization == "none" else f"-{engine.info.quantization}"
        self.fingerprint = f"cabochon-{VERSION}-{engine.info.dtype}{quantized}"

    def check_model(self, name: str | None) -> str:
        """The name to echo, the model's or an adapter's. Raises ApiError (404) if it is not served here."""
        if name is not None and name not in self.names and name not in self.adapters:
            served = (*self.names, *(adapter.info.name for adapter in self.adapters))
            listed = ", ".join(served[:MAX_LISTED]) + (", ..." if len(served) > MAX_LISTED else "")
            raise ApiError(
                f"model must be one of {listed}: see /v1/models",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name or self.names[0]

    async def close(self) -> None:
        """End what runs beside the engine."""
        if self.gate is not None:
            await self.gate.close()
        if self.tracing is not None:
            await self.tracing.close()

    def scrape(self) -> tuple[int, bytes]:
        """Status and text of /metrics. A dead engine has none: its last gauges would look idle."""
        if self.engine.dead_reason() is not None:
            return 503, b"# engine dead\n"
        return 200, self.metrics.render()

    async def chat(self, body: ChatRequest, request: Request) -> Job:
        """A job for POST /v1/chat/completions."""
        head, guard = self._head("chatcmpl", body, request.state.request_id), self._guard(request)
        with self._words_of_chat(body):
            body, choices = await self._guarded(guard, body, chat_texts, self._chat_choices)
        return self._job(body, choices, head, ChatAnswer(head, len(choices), body.tool_use()), guard)

    async def completion(self, body: CompletionRequest, request: Request) -> Job:
        """A job for POST /v1/completions."""
        head, guard = self._head("cmpl", body, request.state.request_id), self._guard(request)
        texts = partial(completion_texts, text_of=partial(self._text_of, skip_special_tokens=False))
        body, choices = await self._guarded(guard, body, texts, self._completion_choices)
        echo = [""] * len(choices)
        if body.echo:
            shown = [
                self._text_of(prompt, skip_special_tokens=body.skip_special_tokens) for prompt in body.prompts
            ]
            echo = [shown[index // body.n] for index in range(len(choices))]
        job = self._job(body, choices, head, CompletionAnswer(head, echo), guard)
        return replace(job, echo=shown) if body.echo else job

    async def response(self, body: ResponsesRequest, request: Request) -> Job:
        """A job for POST /v1/responses."""
        head, guard = self._head("resp", body, request.state.request_id), self._guard(request)
        try:
            chat = body.as_chat()
            with self._words_of_chat(chat):
                texts = partial(chat_texts, param="input")
                chat, choices = await self._guarded(guard, chat, texts, self._chat_choices)
        except (RequestError, ApiError) as error:
            in_our_words(error)
            raise
        return self._job(body, choices, head, ResponseAnswer(head, body, chat.tool_use()), guard)

    async def render(self, body: ChatRequest | CompletionRequest, request_id: str) -> list[dict[str, Any]]:
        """What would run, one entry a prompt, in vLLM's words: endpoint pickers read its tokens."""
        if isinstance(body, ChatRequest):
            prefix = "chatcmpl"
            with self._words_of_chat(body):
                choices = await self._chat_choices(body)
        else:
            prefix, choices = "cmpl", await self._completion_choices(body)
        head = self._head(prefix, body, request_id)
        return [
            {
                "request_id": head.answer_id,
                "model": head.model,
                "token_ids": choice.request.prompt_ids,
                "sampling_params": asdict(choice.request.params),
            }
            for choice in choices[:: body.n]
        ]

    async def respond(self, job: Job, request: Request) -> JsonResponse | EventStream:
        """Run a job. Errors before the first token are raised, so that they get a status of their own."""
        usage, guard = job.head.usage, job.guard
        request.state.log_fields["prompt_tokens"] = usage.prompt_tokens
        # Before admission: who is turned away is demand too
        self.metrics.recent.arrived(sum(len(choice.request.prompt_ids) for choice in job.choices))
        self.lifecycle.admit(len(job.choices))
        deltas = self._run(job, request.state.log_fields, request.state.trace)
        work: Coroutine[Any, Any, Any] = anext(deltas) if job.is_stream else _collect(job.answer, deltas)
        try:
            if guard is not None:
                work = self._beside(guard, job, work)
            result = await or_disconnect(request.receive, work)
        except BaseException:
            await deltas.aclose()  # a token may have come before the verdict
            raise
        headers = None if guard is None else guard.headers()
        if isinstance(result, Delta):
            return EventStream(_events(job.answer, result, deltas), headers)
        return JsonResponse(result, headers=headers)

    async def _beside(self, guard: "RequestGuard", job: Job, work: Coroutine[Any, Any, T]) -> T:
        """`work`, once the prompt has passed. Until then the engine offers its pages to nobody."""
        try:
            guard.set_mode(is_stream=job.is_stream)
            is_known = await guard.start()
            await guard.check_echo(job.echo)
        except BaseException:
            guard.cancel()
            work.close()
            raise
        if not is_known:
            for choice in job.choices:
                choice.request = replace(choice.request, is_private=True)

        def publish() -> None:
            for choice in job.choices:
                self.engine.publish(choice.request.request_id)

        return await guard.beside(work, publish)

    async def _guarded(
        self,
        guard: "RequestGuard | None",
        body: Body,
        texts_of: Callable[[Body], PromptTexts],
        choices_of: Callable[[Body], Awaitable[list[Choice]]],
    ) -> tuple[Body, list[Choice]]:
        """The body as the engine may see it, and its choices: who is refused by them costs no check."""
        choices = await choices_of(body)
        if guard is None:
            return body, choices
        self.lifecycle.admit(1)
        with self.lifecycle.opened(1, 0):  # for the time of a check that comes first
            texts = await asyncio.to_thread(texts_of, body)
            shown = await guard.first(body, texts, num_choices=body.n)
        return shown, choices if shown is body else await choices_of(shown)

    def _guard(self, request: Request) -> "RequestGuard | None":
        if self.gate is None:
            return None
        return self.gate.open(request.headers.get("authorization"), request.state.trace)

    async def _run(
        self, job: Job, log_fields: dict[str, Any], trace: "Trace | None"
    ) -> AsyncGenerator[Delta, None]:
        """Deltas, counted. log_fields get what the access line says of them, the trace their spans."""
        usage = job.head.usage
        wrap = None if job.guard is None else job.guard.wrap
        cached: dict[int, int] = {}  # per prompt, what its first choice found in the cache
        with self.lifecycle.opened(len(job.choices), usage.prompt_tokens) as started:
            try:
                shown = run_choices(self.engine, job.choices, self.metrics, wrap, started)
                async with aclosing(shown) as deltas:
                    async for delta in deltas:
                        cached.setdefault(job.prompts_of[delta.index], delta.cached_tokens)
                        usage.cached_tokens = sum(cached.values())
                        usage.completion_tokens += delta.num_tokens
                        if "ttft_ms" not in log_fields:
                            arrival_s = job.choices[delta.index].request.arrival_s
                            log_fields["ttft_ms"] = round((time.monotonic() - arrival_s) * 1e3)
                        log_fields["completion_tokens"] = usage.completion_tokens
                        yield delta
            finally:
                if trace is not None:
                    trace.add_generation(job.choices, job.head, sys.exception())

    async def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if not prompt:
            raise BadPrompt(
                "a prompt must have at least one character, got none: to start from nothing,"
                " send the token id of <bos>",
                "prompt",
            )
        return await self.prompts.encode(prompt, limit=self.engine.info.max_model_len)

    async def _chat_choices(self, body: ChatRequest) -> list[Choice]:
        tools = body.tool_use()
        prompt = await self.prompts.of_messages(
            body.messages,
            limit=self.engine.info.max_model_len,
            functions=() if tools is None else tools.functions,
            is_parallel=tools is not None and tools.is_parallel,
        )
        return self._choices(body, [prompt], body.max_completion_tokens or body.max_tokens)

    async def _completion_choices(self, body: CompletionRequest) -> list[Choice]:
        prompts = [await self._prompt_ids(prompt) for prompt in body.prompts]
        return self._choices(body, prompts, body.max_tokens)

    @contextmanager
    def _words_of_chat(self, body: ChatRequest) -> Iterator[None]:
        """The engine's names for what is wrong, in words of this endpoint."""
        try:
            yield
        except RequestError as error:
            newer = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
            error.param = {"prompt": "messages", "max_tokens": newer}.get(error.param or "", error.param)
            raise

    def _choices(
        self, body: GenerationRequest, prompts: Sequence[list[int]], max_tokens: int | None
    ) -> list[Choice]:
        if len(prompts) * body.n > MAX_CHOICES:
            raise ApiError(
                f"prompts · n must be at most {MAX_CHOICES}, got {len(prompts)} · {body.n}:"
                " send several bodies",
                param="n",
            )
        last_seed = MAX_SEED - body.n + 1  # choice i uses seed + i
        seed = secrets.randbelow(last_seed) if body.seed is None else body.seed
        if not 0 <= seed <= last_seed:
            raise BadSampling(f"seed must be in [0, 2^63 - n], got {seed}: choose another", "seed")
        now, name, grammar = time.monotonic(), uuid4().hex, body.grammar()
        choices = []
        for index in range(len(prompts) * body.n):
            prompt, draw = divmod(index, body.n)
            request = GenerateRequest(
                request_id=f"{name}-{index}",
                prompt_ids=prompts[prompt],
                params=sampling_params(body, max_tokens, seed + draw, grammar),
                priority=body.priority,
                adapter=None if body.model in self.names else body.model,  # None: the model itself
                cache_salt=body.cache_salt,
                arrival_s=now,
            )
            if draw == 0:  # the others differ in their seed alone
                info = self.engine.info
                check_request(request, max_model_len=info.max_model_len, vocab_size=info.vocab_size)
            choices.append(Choice(index, request, self._detokenizer(body), is_echo_only=max_tokens == 0))
        return choices

    def _head(self, prefix: str, body: SamplingFields, request_id: str) -> Head:
        options = body.stream_options if isinstance(body, GenerationRequest) else None
        return Head(
            answer_id=f"{prefix}-{body.request_id or request_id}",
            model=self.check_model(body.model),
            created=int(time.time()),
            fingerprint=self.fingerprint,
            token_bytes=self.prompts.token_bytes,
            usage=Usage(0),
            include_usage=options is not None and options.include_usage,
            continuous_usage=options is not None and options.continuous_usage_stats,
        )

    def _job(
        self,
        body: SamplingFields,
        choices: list[Choice],
        head: Head,
        answer: Answer,
        guard: "RequestGuard | None",
    ) -> Job:
        num_draws = body.n if isinstance(body, GenerationRequest) else 1
        head.usage.prompt_tokens = sum(len(one.request.prompt_ids) for one in choices[::num_draws])
        return Job(
            choices=choices,
            answer=answer,
            head=head,
            prompts_of=[index // num_draws for index in range(len(choices))],
            is_stream=body.stream,
            guard=guard,
        )

    def _detokenizer(self, body: GenerationRequest) -> Detokenizer:
        return Detokenizer(
            self.prompts.token_bytes,
            stop=body.stop_strings,
            skip_special_tokens=body.skip_special_tokens,
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
        )

    def _text_of(self, prompt: str | list[int], *, skip_special_tokens: bool) -> str:
        if isinstance(prompt, str):
            return prompt  # as it was sent: clients cut it off by its length
        detokenizer = Detokenizer(self.prompts.token_bytes, skip_special_tokens=skip_special_tokens)
        return detokenizer.feed(prompt) + detokenizer.flush()


async def _collect(answer: Answer, deltas: AsyncGenerator[Delta, None]) -> dict[str, Any]:
    async for delta in deltas:
        answer.add(delta)
    return answer.whole()


async def _events(
    answer: Answer, first: Delta, deltas: AsyncGenerator[Delta, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        try:
            for chunk in (*answer.opening(), *answer.events(first)):
                yield chunk
            async for delta in deltas:
                for chunk in answer.events(delta):
                    yield chunk
        except Exception as error:  # the status is sent: the error can only be an event
            for chunk in answer.failure(as_api_error(error)):
                yield chunk
            return
        for chunk in answer.closing():
            yield chunk
