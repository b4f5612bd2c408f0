"""The Checker that asks Model Armor. Whatever happens to a call, a verdict comes, and in time."""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

from cabochon.server.armor.breaker import Breaker
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.connections import Connections, Failure, UnclearReply, failure_of
from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.judge import judge
from cabochon.server.armor.policies import Policies
from cabochon.server.armor.quota import Quota
from cabochon.server.armor.templates import Templates, Use
from cabochon.server.armor.verdict_cache import VerdictCache
from cabochon.server.armor.verdicts import Policy, Reason, Stage, Verdict

logger = logging.getLogger(__name__)

MAX_CHARS = 200_000  # of one call; the service's limit is 65,536 tokens of 4
OVERLAP_CHARS = 2_000  # of the parts of a longer text
WARN_EVERY_S = 60.0
RETRY_PAUSE_S = 0.1  # in which the channel connects again; a tenth of what is left if that is less
PASS = Verdict(outcome="pass")


def split(text: str) -> list[str]:
    """Parts of MAX_CHARS at most, cut at blanks; each begins with OVERLAP_CHARS of the one before."""
    parts, start = [], 0
    while len(text) - start > MAX_CHARS:
        end = start + MAX_CHARS
        blank = max(text.rfind(mark, end - OVERLAP_CHARS, end) for mark in " \n\t")
        end = blank + 1 if blank > 0 else end
        parts.append(text[start:end])
        start = end - OVERLAP_CHARS
    return [*parts, text[start:]]


class ArmorChecker:
    """A Checker (`verdicts`). Raises ConfigError if the package is not installed."""

    def __init__(self, config: ArmorConfig, policies: Policies, metrics: GuardMetrics) -> None:
        self._config = config
        self._policies = policies
        self._metrics = metrics
        self._connections = Connections(config)
        self._quota = Quota(config.armor_quota_per_min, config.armor_max_replicas)
        self._templates = Templates(self._connections, lambda: self._quota.take("prompt"))
        self._cache = VerdictCache(config.armor_cache_s)
        self._breakers: dict[str, Breaker] = {}  # by endpoint
        self._warned_s: dict[tuple[str, Reason], float] = {}
        self._num_inflight = 0
        metrics.watch(lambda: self._num_inflight, self._quota.available, self._breaker_state)

    async def start(self) -> None:
        """Ask for the templates' facts, on the loop that serves; then see `problem`."""
        await self._templates.start(self._policies.uses)

    def problem(self) -> str | None:
        """What keeps the server from being ready: a role or a template that must be there. None: nothing."""
        return self._templates.problem()

    async def close(self) -> None:
        """Ends the channels; checks are unchecked from now on."""
        await self._templates.close()
        await self._connections.close()

    def pressure(self) -> float:
        """How much of the quota's bucket is used up, 0 to 1: larger windows need fewer calls."""
        return self._quota.pressure()

    def version(self, policy: Policy, stage: Stage) -> str:
        """See Checker."""
        template = policy.prompt_template if stage == "prompt" else policy.response_template
        facts = self._templates.known(Use(template, stage)) if template is not None else None
        return facts.version if facts is not None else ""

    def may_rewrite(self, policy: Policy, stage: Stage) -> bool:
        """Whether the template de-identifies, or might."""
        template = policy.prompt_template if stage == "prompt" else policy.response_template
        facts = self._templates.known(Use(template, stage)) if template is not None else None
        return template is not None and (facts is None or facts.may_rewrite)

    def refuses(self, policy: Policy, stage: Stage) -> bool:
        """See Checker: the breaker is open, or the bucket empty."""
        template = policy.prompt_template if stage == "prompt" else policy.response_template
        if template is None:
            return False
        breaker = self._breakers.get(self._connections.endpoint(template))
        return (breaker is not None and breaker.refuses()) or self._quota.available() < 1

    async def check(self, policy: Policy, stage: Stage, text: str, *, context: str = "") -> Verdict:
        """See Checker. Without a template, or if there are only blanks, there is nothing to ask.

        A text above MAX_CHARS is checked in parts, all at once: all must pass, and none may be rewritten.
        """
        template = policy.prompt_template if stage == "prompt" else policy.response_template
        if template is None or not text.strip():
            return PASS
        use, optional = Use(template, stage), tuple(sorted(policy.optional_filters))
        ask = partial(self._ask, use, split(text), context, optional)
        if stage == "prompt":
            facts = self._templates.known(use)
            key = self._cache.key(template, facts.version if facts else "", optional, context, text)
            verdict = await self._cache.find_or_ask(key, ask)
        else:
            verdict = await ask()
        self._metrics.checked(stage, verdict, policy.on_unchecked)
        return verdict

    async def _ask(self, use: Use, parts: Sequence[str], context: str, optional: tuple[str, ...]) -> Verdict:
        started_s = time.perf_counter()
        contexts = [context] + [""] * (len(parts) - 1)
        verdicts = await asyncio.gather(
            *[self._ask_part(use, *pair, optional) for pair in zip(parts, contexts, strict=True)]
        )
        self._metrics.asked(use.stage, time.perf_counter() - started_s, sum(map(len, parts)) + len(context))
        return verdicts[0] if len(verdicts) == 1 else _all_together(verdicts)

    async def _ask_part(self, use: Use, text: str, context: str, optional: tuple[str, ...]) -> Verdict:
        """One call, and a second one if the first could not reach the service; both within the total."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._config.armor_total_timeout_s
        is_prompt = use.stage == "prompt"
        limit_s = self._config.armor_prompt_timeout_s if is_prompt else self._config.armor_window_timeout_s
        failure = Failure("unavailable")
        for attempt in range(2):
            timeout_s = min(limit_s, end_s - loop.time())
            found = await self._attempt(use, text, context, optional, timeout_s)
            if isinstance(found, Verdict):
                return found
            failure = found
            if not failure.may_retry:
                break
            if attempt == 0:
                await asyncio.sleep(min(RETRY_PAUSE_S, (end_s - loop.time()) / 10))
        self._warn(use, failure)
        return Verdict(outcome="unchecked", reason=failure.reason)

    async def _attempt(
        self, use: Use, text: str, context: str, optional: tuple[str, ...], timeout_s: float
    ) -> Verdict | Failure:
        breaker = self._breakers.setdefault(self._connections.endpoint(use.template), Breaker())
        ticket = breaker.enter()
        if ticket is None:
            return Failure("breaker")
        is_ok: bool | None = None
        try:
            if not self._quota.take(use.stage):
                return Failure("quota")
            self._num_inflight += 1
            try:
                verdict = await self._call(use, text, context, optional, timeout_s)
            finally:
                self._num_inflight -= 1
            is_ok = True
            return verdict
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            is_ok = False  # the service's own status CANCELLED
            return Failure("unavailable")
        except Exception as error:  # the promise of `check`: errors hold text, so only their kind goes on
            failure = failure_of(error)
            is_ok = False if failure.counts else None
            if failure.reason == "quota":
                self._quota.refused()
            return failure
        finally:
            breaker.leave(ticket, is_ok)

    async def _call(
        self, use: Use, text: str, context: str, optional: tuple[str, ...], timeout_s: float
    ) -> Verdict:
        async with asyncio.timeout(timeout_s):  # it holds, whatever the client makes of its own deadline
            facts = await self._templates.facts(use)
            sent = text if facts.may_rewrite else context + text  # a rewrite replaces all that was sent
            result = await self._connections.sanitize(*use, sent, timeout_s)
        if result is None:
            raise UnclearReply
        return judge(result, facts, sent, optional)

    def _breaker_state(self) -> int:
        states = [breaker.state for breaker in self._breakers.values()]
        return 2 if "open" in states else int("half open" in states)

    def _warn(self, use: Use, failure: Failure) -> None:
        """Once a minute for each template and reason: what happens to every call is in the metrics."""
        now, key = time.monotonic(), (use.template, failure.reason)
        if now >= self._warned_s.get(key, now):
            self._warned_s[key] = now + WARN_EVERY_S
            logger.warning("model armor unchecked template=%s stage=%s reason=%s", *use, failure.reason)


def _all_together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of the parts of one text."""
    matched = tuple(sorted({name for verdict in verdicts for name in verdict.filters}))
    if any(verdict.outcome in ("block", "rewrite") for verdict in verdicts):
        return Verdict(outcome="block", filters=matched)
    unchecked = [verdict for verdict in verdicts if verdict.outcome == "unchecked"]
    return unchecked[0] if unchecked else Verdict(outcome="pass", filters=matched)
