"""The guard of a server and of one request: no answer before the prompt's verdict, none of it unchecked.

A prompt is checked while the engine works on it: the first byte of the answer waits for both. Three things
make it be checked first: a template that may rewrite it, a queue long enough to hide the check, and several
choices, which could not share its pages before the verdict.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING, TypeVar

from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.prompt_texts import PromptTexts
from cabochon.server.armor.response_guard import Blocked, Windows, guarded
from cabochon.server.armor.verdict_cache import VerdictCache
from cabochon.server.armor.verdicts import Checker, Mode, Policy, Stage, Verdict
from cabochon.server.errors import ApiError
from cabochon.server.generation import Choice, Delta

if TYPE_CHECKING:
    from cabochon.server.spans import Trace

T = TypeVar("T")
B = TypeVar("B")
RETRY_AFTER_S = 5  # the breaker's pause
CONTEXT_CHARS = 2_000  # of the text before new ones: a phrase may be cut in two turns
MAX_REWRITTEN = 64  # texts of a body, a call each
MAX_AT_ONCE = 8
JOINT = "\n\n"  # between the texts of a body that are checked in one call


class Gate:
    """One per server. Asks `checker`, counts, and turns verdicts into what clients see."""

    def __init__(
        self,
        checker: Checker,
        policy_of: Callable[[str | None], Policy],
        config: ArmorConfig,
        metrics: GuardMetrics,
        predicted_wait_s: Callable[[], float],
    ) -> None:
        """policy_of: from an Authorization header. predicted_wait_s: of the engine's queue, in seconds."""
        self.checker = checker
        self.metrics = metrics
        self.config = config
        self._policy_of = policy_of
        self._predicted_wait_s = predicted_wait_s
        self._passed = VerdictCache(config.armor_cache_s)  # beginnings of prompts
        self.windows = Windows(
            first_chars=config.armor_first_window_chars,
            max_chars=config.armor_max_window_chars,
            hold_back_chars=config.armor_hold_back_chars,
            context_chars=config.armor_context_chars,
            max_hold_s=config.armor_max_hold_s,
            pressure=checker.pressure,
        )

    async def close(self) -> None:
        """Ask no more."""
        await self.checker.close()

    def open(self, authorization: str | None, trace: "Trace | None") -> "RequestGuard":
        """The guard of a request with that Authorization header."""
        return RequestGuard(self, self._policy_of(authorization), trace)

    def has_queue(self) -> bool:
        """Whether a prompt waits longer for the engine than for its verdict."""
        return self._predicted_wait_s() > self.config.armor_serial_queue_s

    def num_known(self, policy: Policy, texts: Sequence[str]) -> int:
        """How many of a prompt's texts, from its beginning, have passed lately: a chat sends them again."""
        for number, key in enumerate(self._keys(policy, texts)):
            if self._passed.find(key) is None:
                return number
        return len(texts)

    def remember(self, policy: Policy, texts: Sequence[str], verdict: Verdict) -> None:
        """They have passed, in this order: another order or another beginning is another prompt."""
        for key in self._keys(policy, texts):
            self._passed.keep(key, verdict)

    def _keys(self, policy: Policy, texts: Sequence[str]) -> Iterator[bytes]:
        version = self.checker.version(policy, "prompt")
        key = self._passed.key(str(policy.prompt_template), version, policy.optional_filters)
        for text in texts:
            key = self._passed.key(key.hex(), text)
            yield key


class RequestGuard:
    """What one request goes through: `first`, `start` and `beside` for its prompt, `wrap` for its answers."""

    def __init__(self, gate: Gate, policy: Policy, trace: "Trace | None") -> None:
        self._gate = gate
        self._policy = policy
        self._trace = trace
        self._param = "messages"
        self._texts: list[str] = []  # still to be checked
        self._check: asyncio.Task[None] | None = None
        self._prompt = "skipped"
        self._prompt_s = 0.0
        self._mode: Mode = "off"

    def headers(self) -> dict[str, str]:
        """What the answer says of its checks."""
        return {
            "x-guardrail": f"modelarmor;prompt={self._prompt};response={self._mode}",
            "x-guardrail-prompt-ms": f"{self._prompt_s * 1e3:.0f}",
        }

    async def first(self, body: B, prompt: PromptTexts, *, num_choices: int) -> B:
        """The body as the engine may see it. Raises ApiError if it must not, or if nobody can tell.

        Without a reason to check it first this only remembers the texts, for `start`.
        """
        self._param = prompt.param
        texts = [text for text in prompt.texts if text.strip()]
        if self._policy.prompt_template is None or not texts:
            return body
        if self._gate.checker.may_rewrite(self._policy, "prompt"):
            rewritten = await self._timed(self._rewritten(prompt.texts))
            if rewritten == prompt.texts:
                return body
            self._prompt = "rewritten"
            replaced = prompt.replaced(rewritten)
            if replaced is None:
                raise self._blocked(())
            return replaced  # type: ignore[no-any-return]  # of the body's own kind
        self._texts = texts
        if num_choices > 1 or self._gate.has_queue():
            await self._timed(self._pass(texts))
            self._texts = []
        return body

    async def start(self) -> bool:
        """Begin the check. Returns whether the prompt has passed already, as one known does. May raise."""
        if not self._texts:
            return True
        self._check = asyncio.create_task(self._timed(self._pass(self._texts)))
        if self._gate.checker.refuses(self._policy, "prompt"):
            await asyncio.wait({self._check})  # some turns of the loop: the engine need not begin in vain
        else:
            await asyncio.sleep(0)
        if self._check.done():
            self._check.result()
        return self._check.done()

    async def beside(self, work: Awaitable[T], on_pass: Callable[[], None]) -> T:
        """What `work` gives, once the prompt has passed too. Else `work` is cancelled, and this raises."""
        task = asyncio.ensure_future(work)
        check = self._check
        if check is None:
            return await task
        try:
            await asyncio.wait({task, check}, return_when=asyncio.FIRST_COMPLETED)
            if not check.done() and task.exception() is not None:
                return task.result()  # which raises: nothing will be answered, so nothing need be checked
            ready_s = time.monotonic()
            await check
            on_pass()
            self._gate.metrics.delayed(time.monotonic() - ready_s if task.done() else 0.0)
            return await task
        finally:
            for each in (task, check):
                each.cancel()
            await asyncio.gather(task, check, return_exceptions=True)

    def cancel(self) -> None:
        """Nobody waits for the verdict any more."""
        if self._check is not None:
            self._check.cancel()

    def set_mode(self, *, is_stream: bool) -> None:
        """An answer in one piece is checked in one piece, too: windows would only cost calls."""
        mode = self._policy.mode if self._policy.response_template is not None else "off"
        self._mode = mode if is_stream or mode == "off" else "strict"

    async def check_echo(self, texts: Sequence[str]) -> None:
        """An echoed prompt is a part of the answer. Raises ApiError if it may not be shown as it is."""
        if self._mode == "off":
            return
        try:
            for text in filter(str.strip, texts):
                if await self._approve("", text) != text:
                    raise self._blocked(())
        except Blocked as error:
            raise self._blocked(error.filters) from None

    def wrap(self, _choice: Choice, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        """The deltas of a choice as they may be shown."""
        if self._mode == "off":
            return deltas
        return self._wrapped(deltas)

    async def _wrapped(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        num_windows = 0

        async def approve(context: str, text: str) -> str:
            nonlocal num_windows
            num_windows += 1
            return await self._approve(context, text)

        gate = self._gate
        shown = guarded(deltas, approve, mode=self._mode, windows=gate.windows, observe=gate.metrics.held)
        try:
            async with aclosing(shown):
                async for delta in shown:
                    yield delta
        finally:
            if num_windows > 0:  # an answer, not a prompt that was blocked
                gate.metrics.answered(num_windows)

    async def _timed(self, work: Awaitable[T]) -> T:
        started_s = time.monotonic()
        with nullcontext() if self._trace is None else self._trace.span("armor"):
            result = await work
        self._prompt_s = time.monotonic() - started_s
        if self._prompt == "skipped":
            self._prompt = "pass"
        return result

    async def _pass(self, texts: Sequence[str]) -> None:
        """All new texts in one call: calls are what is scarce. Raises ApiError unless they pass."""
        if (verdict := await self._joint(texts)) is None:
            return
        if verdict.outcome == "rewrite":  # the template has changed, and what the engine has is the original
            raise _outage("prompt")
        if verdict.outcome == "block":
            raise self._blocked(verdict.filters)
        if verdict.outcome == "unchecked":
            self._let_pass("prompt")
            self._prompt = "unchecked"

    async def _joint(self, texts: Sequence[str]) -> Verdict | None:
        """On all new texts at once, behind the end of what passed before them. None: there are none."""
        gate, policy = self._gate, self._policy
        num_known = gate.num_known(policy, texts)
        if num_known == len(texts):
            return None
        before = [text[-CONTEXT_CHARS:] for text in texts[max(0, num_known - 1) : num_known]]
        verdict = await gate.checker.check(policy, "prompt", JOINT.join([*before, *texts[num_known:]]))
        if verdict.outcome == "pass":
            gate.remember(policy, texts, verdict)
        return verdict

    async def _rewritten(self, texts: Sequence[str]) -> list[str]:
        """One call if nothing is to be rewritten; else one for each text, for it replaces all that was sent.

        Raises ApiError.
        """
        spoken = [text for text in texts if text.strip()]
        verdict = await self._joint(spoken)
        if verdict is None or verdict.outcome == "pass":
            return list(texts)
        if verdict.outcome != "rewrite":
            self._prompt = "unchecked" if verdict.outcome == "unchecked" else self._prompt
            self._shown_prompt(verdict, "")
            return list(texts)
        if len(spoken) > MAX_REWRITTEN:
            raise ApiError(
                f"a body with what must be de-identified must have at most {MAX_REWRITTEN} texts,"
                f" got {len(spoken)}: join turns, or leave old ones out",
                param=self._param,
            )
        at_once = asyncio.Semaphore(MAX_AT_ONCE)

        async def rewritten(text: str) -> str:
            async with at_once:
                return await self._rewritten_text(text)

        tasks = [asyncio.create_task(rewritten(text)) for text in texts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:  # one that is blocked ends the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _rewritten_text(self, text: str) -> str:
        if not text.strip():
            return text
        verdict = await self._gate.checker.check(self._policy, "prompt", text)
        if verdict.outcome == "unchecked":
            self._prompt = "unchecked"
        return self._shown_prompt(verdict, text)

    def _shown_prompt(self, verdict: Verdict, text: str) -> str:
        try:
            return self._shown("prompt", verdict, text)
        except Blocked as error:
            raise self._blocked(error.filters) from None

    async def _approve(self, context: str, text: str) -> str:
        """For the response guard. Raises Blocked, or ApiError."""
        checker = self._gate.checker
        verdict = await checker.check(self._policy, "response", text, context=context)
        return self._shown("response", verdict, text)

    def _shown(self, stage: Stage, verdict: Verdict, text: str) -> str:
        if verdict.outcome == "block":
            raise Blocked(verdict.filters)
        if verdict.outcome == "unchecked":
            self._let_pass(stage)
        if verdict.rewritten is None:
            return text
        self._gate.metrics.rewrote(stage)
        return verdict.rewritten

    def _let_pass(self, stage: Stage) -> None:
        """Raises ApiError, unless the policy is to go on without a check."""
        if self._policy.on_unchecked == "closed":
            raise _outage(stage)
        self._gate.metrics.failed_open(stage)

    def _blocked(self, filters: Sequence[str]) -> ApiError:
        families = sorted({name.partition(":")[0] for name in filters}) if self._policy.reveal else []
        return ApiError(
            "The prompt was blocked by the content policy.",
            param=self._param,
            code="content_filter",
            inner={
                "code": "ResponsibleAIPolicyViolation",
                "content_filter_result": {name: {"filtered": True, "detected": True} for name in families},
            },
            headers={"x-guardrail": "modelarmor;prompt=block"},
        )


def _outage(stage: Stage) -> ApiError:
    return ApiError(
        "every text must be checked by the content policy, its service gives no verdict now: retry later",
        status=503,
        type="server_error",
        code="guardrail_unavailable",
        headers={"Retry-After": str(RETRY_AFTER_S), "x-guardrail": f"modelarmor;{stage}=unavailable"},
    )
