"""What templates do, asked at start and again every few minutes: the service's replies do not say it.

get_template needs a viewer's permission, which those who may sanitize need not have. So a harmless text is
sent too: it proves the permission to sanitize, and shows which filters answer. Without get_template the facts
are those that are safe in any case.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from cabochon.server.armor.connections import Connections, Failure, UnclearReply, failure_of
from cabochon.server.armor.judge import SUCCESS, TemplateFacts, filters_of
from cabochon.server.armor.verdicts import Stage

logger = logging.getLogger(__name__)

PROBE_TEXT = "What is the capital of France?"
TIMEOUT_S = 5.0  # of each of the two calls; the first one of all waits for a token
REFRESH_S = 300.0
RETRY_S = 10.0  # while a template cannot be used
INSPECT_ONLY = 1  # Template.TemplateMetadata.EnforcementType
UNSPECIFIED, DISABLED = 0, 2  # of filter_enforcement, everywhere


class Use(NamedTuple):
    """A template, and what it is asked about."""

    template: str
    stage: Stage


def facts_of(template: Any | None, probe: Any | None) -> TemplateFacts:
    """template: a Template, None if it cannot be read. probe: a reply to a harmless text, or None.

    Raises UnclearReply if the probe says nothing that one could rely on.
    """
    seen = filters_of(probe)
    if probe is None or not seen or (template is None and probe.invocation_result != SUCCESS):
        raise UnclearReply
    version = probe._pb.sanitization_metadata.filter_version_config.filter_version
    if template is None:
        return TemplateFacts(filters=seen, version=version)
    config, metadata = template._pb.filter_config, template._pb.template_metadata
    sdp = config.sdp_settings.WhichOneof("sdp_configuration")
    injection, uris = config.pi_and_jailbreak_filter_settings, config.malicious_uri_filter_settings
    basic, advanced = config.sdp_settings.basic_config, config.sdp_settings.advanced_config
    is_on = {
        "rai": len(config.rai_settings.rai_filters) > 0,
        "sdp": sdp == "advanced_config" or basic.filter_enforcement not in (UNSPECIFIED, DISABLED),
        "pi_and_jailbreak": injection.filter_enforcement not in (UNSPECIFIED, DISABLED),
        "malicious_uris": uris.filter_enforcement not in (UNSPECIFIED, DISABLED),
        "csam": "csam" in seen,  # no template mentions it: it is always on, where the location has it
    }
    inspect_only = metadata.enforcement_type == INSPECT_ONLY
    return TemplateFacts(
        filters=frozenset(name for name, on in is_on.items() if on),
        may_rewrite=bool(advanced.deidentify_template) and not inspect_only,
        inspect_only=inspect_only,
        version=f"{template._pb.update_time.ToNanoseconds()}/{version}",
    )


class Templates:
    """The facts of each use, and what is wrong with those that must work at start."""

    def __init__(self, connections: Connections, spend: Callable[[], object]) -> None:
        """spend: called for each sanitize call that is made here, so that it counts."""
        self._connections = connections
        self._spend = spend
        self._facts: dict[Use, TemplateFacts] = {}
        self._problems: dict[Use, str] = {}
        self._warned: set[tuple[str, str]] = set()
        self._locks: dict[Use, asyncio.Lock] = {}
        self._refresh: asyncio.Task[None] | None = None

    def known(self, use: Use) -> TemplateFacts | None:
        """None: it was not reached yet."""
        return self._facts.get(use)

    def problem(self) -> str | None:
        """Why the server must not be ready: a template of the start that never worked, and what to do."""
        return next(iter(self._problems.values()), None)

    async def facts(self, use: Use) -> TemplateFacts:
        """Those that are known, or asked for now. Raises what the connection does, and UnclearReply."""
        async with self._locks.setdefault(use, asyncio.Lock()):
            return self._facts.get(use) or await self._ask(use)

    async def start(self, uses: Callable[[], Collection[Use]]) -> None:
        """Ask for all, then keep asking: `uses` gives those of the present policies."""
        await self._load(uses(), is_start=True)
        self._refresh = asyncio.create_task(self._keep_fresh(uses))

    async def close(self) -> None:
        """Asks no more."""
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.gather(self._refresh, return_exceptions=True)

    async def _keep_fresh(self, uses: Callable[[], Collection[Use]]) -> None:
        while True:
            await asyncio.sleep(RETRY_S if self._problems else REFRESH_S)
            try:
                current = uses()
                for gone in self._problems.keys() - set(current):  # no policy names it any more
                    del self._problems[gone]
                await self._load(current, is_start=False)
            except Exception as error:  # its kind alone, for its words may be of a file with keys
                logger.error("model armor templates not asked about error=%s", type(error).__name__)

    async def _load(self, uses: Collection[Use], is_start: bool) -> None:
        await asyncio.gather(*[self._load_one(use, is_start) for use in uses])

    async def _load_one(self, use: Use, is_start: bool) -> None:
        try:
            await self._ask(use)
            return
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            failure = Failure("unavailable")  # the service's own status CANCELLED
        except Exception as error:  # of any kind: the facts of before hold, and checks meet the same
            failure = failure_of(error)
        logger.warning("model armor template=%s stage=%s cannot be used reason=%s", *use, failure.reason)
        if (is_start or use in self._problems) and failure.reason in ("denied", "invalid"):
            self._problems[use] = _what_to_do(use, failure)

    async def _ask(self, use: Use) -> TemplateFacts:
        template = await self._read(use.template)
        self._spend()
        probe = await self._connections.sanitize(*use, PROBE_TEXT, TIMEOUT_S)
        facts = facts_of(template, probe)
        self._facts[use] = facts
        self._problems.pop(use, None)
        return facts

    async def _read(self, template: str) -> Any | None:
        """The Template; None if it cannot be read, with a warning."""
        try:
            found = await self._connections.get_template(template, TIMEOUT_S)
        except Exception as error:  # the probe meets what is not the viewer's permission
            found, reason = None, failure_of(error).reason
        else:
            reason = "malformed"
        if found is None:
            self._warn(
                template,
                f"cannot be read reason={reason}, so prompts wait for their check:"
                " give the server modelarmor.templates.get (roles/modelarmor.viewer)",
            )
        elif found.template_metadata.log_sanitize_operations:
            self._warn(template, "has log_sanitize_operations: prompts and answers go to Cloud Logging")
        return found

    def _warn(self, template: str, message: str) -> None:
        if (template, message) not in self._warned:  # once, not every five minutes
            self._warned.add((template, message))
            logger.warning("model armor template=%s %s", template, message)


def _what_to_do(use: Use, failure: Failure) -> str:
    if failure.reason == "denied":
        return (
            f"the server must be allowed to sanitize with {use.template}, it is not:"
            " give its service account roles/modelarmor.user, and let it find its credentials"
        )
    return (
        f"{use.template} must be a template that Model Armor has at this endpoint, it is not:"
        " create it, or correct its name"
    )
