"""What the routes share: from a parsed body to engine requests, and from their text to an answer."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal
from uuid import uuid4

from starlette.requests import Request

from cabochon.engine.admission import check_request
from cabochon.engine.detokenizer import Detokenizer
from cabochon.engine.engine import Engine
from cabochon.engine.errors import BadPrompt, BadSampling, RequestError
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import MAX_SEED, SamplingParams
from cabochon.server.config import ServerConfig
from cabochon.server.errors import ApiError, as_api_error
from cabochon.server.formats import Format, Usage
from cabochon.server.generation import Choice, Delta, run_choices
from cabochon.server.lifecycle import Lifecycle
from cabochon.server.logprobs import ScoredTokens, text_length
from cabochon.server.metrics import Metrics
from cabochon.server.prompts import Prompts
from cabochon.server.protocol import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationRequest
from cabochon.server.streaming import DONE, EventStream, JsonResponse, event, or_disconnect

VERSION = version("cabochon")


@dataclass(frozen=True, slots=True)
class Job:
    """A body, ready to run. echo: per choice, text that goes before the generated one."""

    choices: list[Choice]
    echo: list[str]
    frame: Format
    usage: Usage
    prompts_of: list[int]  # per choice, which prompt it continues
    is_stream: bool
    include_usage: bool
    continuous_usage: bool


class Service:
    """One served model: engine, tokenizer, names, metrics and lifecycle."""

    def __init__(self, engine: Engine, prompts: Prompts, config: ServerConfig) -> None:
        self.engine = engine
        self.prompts = prompts
        self.config = config
        self.names = config.served_model_name or (engine.info.model,)
        self.metrics = Metrics(engine, self.names[0])
        self.lifecycle = Lifecycle(engine, config)
        self.started = int(time.time())
        self.fingerprint = f"cabochon-{VERSION}-{engine.info.dtype}"

    def check_model(self, name: str | None) -> str:
        """The name to echo. Raises ApiError (404) if it is not served here."""
        if name is not None and name not in self.names:
            raise ApiError(
                f"model must be one of {', '.join(self.names)}: see /v1/models",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name or self.names[0]

    async def chat(self, body: ChatRequest, request_id: str) -> Job:
        """A job for POST /v1/chat/completions."""
        model = self.check_model(body.model)
        prompt = await self.prompts.of_messages(body.messages, limit=self.engine.info.max_model_len)
        try:
            return self._job(
                "chat", body, [prompt], body.max_completion_tokens or body.max_tokens, model, request_id
            )
        except RequestError as error:  # the engine's names, in words of this endpoint
            newer = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
            error.param = {"prompt": "messages", "max_tokens": newer}.get(error.param or "", error.param)
            raise

    async def completion(self, body: CompletionRequest, request_id: str) -> Job:
        """A job for POST /v1/completions."""
        model = self.check_model(body.model)
        prompts = [await self._prompt_ids(prompt) for prompt in _as_batch(body.prompt)]
        job = self._job("completion", body, prompts, body.max_tokens, model, request_id)
        if body.echo:
            texts = [self._text_of(prompt, body) for prompt in _as_batch(body.prompt)]
            job.echo[:] = [texts[prompt] for prompt in job.prompts_of]
        return job

    async def respond(self, job: Job, request: Request) -> JsonResponse | EventStream:
        """Run a job. Errors before the first token are raised, so that they get a status of their own."""
        deltas = self._run(job, request.state.log_fields)
        if not job.is_stream:
            async with aclosing(deltas):
                return JsonResponse(await or_disconnect(request.receive, _collect(job, deltas)))
        first = await or_disconnect(request.receive, anext(deltas))
        return EventStream(_events(job, first, deltas))

    async def _run(self, job: Job, log_fields: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        """Deltas, counted. log_fields get what the access line says of them."""
        usage = job.usage
        log_fields["prompt_tokens"] = usage.prompt_tokens
        self.lifecycle.admit(len(job.choices))
        cached: dict[int, int] = {}  # per prompt, what its first choice found in the cache
        with self.lifecycle.opened(len(job.choices), usage.prompt_tokens) as started:
            async with aclosing(run_choices(self.engine, job.choices, self.metrics)) as deltas:
                async for delta in deltas:
                    started()
                    cached.setdefault(job.prompts_of[delta.index], delta.cached_tokens)
                    usage.cached_tokens = sum(cached.values())
                    usage.completion_tokens += delta.num_tokens
                    if "ttft_ms" not in log_fields:
                        arrival_s = job.choices[delta.index].request.arrival_s
                        log_fields["ttft_ms"] = round((time.monotonic() - arrival_s) * 1e3)
                    log_fields["completion_tokens"] = usage.completion_tokens
                    yield delta

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

    def _job(
        self,
        kind: Literal["chat", "completion"],
        body: GenerationRequest,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        model: str,
        request_id: str,
    ) -> Job:
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
        now, name = time.monotonic(), uuid4().hex
        choices = []
        for index in range(len(prompts) * body.n):
            prompt, draw = divmod(index, body.n)
            request = GenerateRequest(
                request_id=f"{name}-{index}",
                prompt_ids=prompts[prompt],
                params=_sampling_params(body, max_tokens, seed + draw),
                priority=body.priority,
                cache_salt=body.cache_salt,
                arrival_s=now,
            )
            if draw == 0:  # the others differ in their seed alone
                info = self.engine.info
                check_request(request, max_model_len=info.max_model_len, vocab_size=info.vocab_size)
            choices.append(Choice(index, request, self._detokenizer(body), is_echo_only=max_tokens == 0))
        options = body.stream_options
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return Job(
            choices=choices,
            echo=[""] * len(choices),
            frame=Format(
                kind,
                f"{prefix}-{body.request_id or request_id}",
                model,
                int(time.time()),
                self.fingerprint,
                self.prompts.token_bytes,
            ),
            usage=Usage(sum(map(len, prompts))),
            prompts_of=[index // body.n for index in range(len(choices))],
            is_stream=body.stream,
            include_usage=options is not None and options.include_usage,
            continuous_usage=options is not None and options.continuous_usage_stats,
        )

    def _detokenizer(self, body: GenerationRequest) -> Detokenizer:
        return Detokenizer(
            self.prompts.token_bytes,
            stop=body.stop_strings,
            skip_special_tokens=body.skip_special_tokens,
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
        )

    def _text_of(self, prompt: str | list[int], body: GenerationRequest) -> str:
        if isinstance(prompt, str):
            return prompt  # as it was sent: clients cut it off by its length
        detokenizer = Detokenizer(self.prompts.token_bytes, skip_special_tokens=body.skip_special_tokens)
        return detokenizer.feed(prompt) + detokenizer.flush()


def _as_batch(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _sampling_params(body: GenerationRequest, max_tokens: int | None, seed: int) -> SamplingParams:
    try:
        bias = {int(token_id): value for token_id, value in body.logit_bias.items()}
    except ValueError:
        raise ApiError("logit_bias must have token ids as keys: correct it", param="logit_bias") from None
    return SamplingParams(
        max_tokens=1 if max_tokens == 0 else max_tokens,  # an echo alone: the token is not shown
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        seed=seed,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        grammar=body.grammar(),
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_logprobs if isinstance(body, CompletionRequest) and body.echo else None,
    )


async def _collect(job: Job, deltas: AsyncGenerator[Delta, None]) -> dict[str, Any]:
    texts = list(job.echo)
    reasons: list[str | None] = [None] * len(texts)
    scored: list[ScoredTokens | None] = [None] * len(texts)
    async for delta in deltas:
        texts[delta.index] += delta.text
        reasons[delta.index] = delta.finish_reason
        if delta.scored is not None:
            scored[delta.index] = so_far = scored[delta.index] or ScoredTokens()
            so_far.extend(delta.scored.token_ids, delta.scored.logprobs)
    return job.frame.whole(texts, reasons, scored, job.usage)


async def _events(job: Job, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
    offsets: dict[int, int] = {}  # of choices that were seen

    def render(delta: Delta) -> bytes | None:
        is_first = delta.index not in offsets
        if not (delta.text or delta.finish_reason or is_first or delta.scored):
            return None  # held back: the start of a stop string, or half a character
        offset = offsets.setdefault(delta.index, 0)
        if delta.scored is not None:
            offsets[delta.index] += text_length(delta.scored, job.frame.token_bytes)
        if is_first:
            delta.text = job.echo[delta.index] + delta.text
        usage: dict[str, Any] = {}
        if job.continuous_usage:
            usage = {"usage": job.usage.as_json()}
        elif job.include_usage:
            usage = {"usage": None}
        return event(job.frame.chunk(delta, is_first=is_first, usage=usage, offset=offset))

    async with aclosing(deltas):
        try:
            if chunk := render(first):
                yield chunk
            async for delta in deltas:
                if chunk := render(delta):
                    yield chunk
            if job.include_usage:
                yield event(job.frame.last(job.usage))
        except Exception as error:  # the status is sent: the error can only be an event
            yield event(as_api_error(error).body())
            return
        yield DONE
