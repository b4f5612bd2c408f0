"""What a check says of a text, and who asks for it: the words that all parts of the guard share."""

from dataclasses import dataclass
from typing import Literal, Protocol

Stage = Literal["prompt", "response"]
Mode = Literal["strict", "window", "optimistic", "off"]
Outcome = Literal["pass", "rewrite", "block", "unchecked"]
Reason = Literal["timeout", "unavailable", "quota", "denied", "invalid", "partial", "malformed", "breaker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one API key's requests go through. Templates are full resource names; None: not checked."""

    prompt_template: str | None = None  # projects/P/locations/L/templates/T
    response_template: str | None = None
    mode: Mode = "window"  # of answers; `off` without a response template
    on_unchecked: Literal["closed", "open"] = "closed"  # what an outage does: an error, or nothing
    reveal: bool = False  # tell clients which family of filters blocked
    optional_filters: tuple[str, ...] = ()  # may be skipped by the service; csam, pi_and_jailbreak never


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one text. Only `pass`, and `rewrite` with its own text, may be shown as they are."""

    outcome: Outcome
    rewritten: str | None = None  # instead of the text, if the outcome is rewrite
    filters: tuple[str, ...] = ()  # that matched, RAI by type (`rai:harassment`); never what they found
    reason: Reason | None = None  # why it is unchecked


class Checker(Protocol):
    """Asks Model Armor. Cancelling the caller cancels the call."""

    async def check(self, policy: Policy, stage: Stage, text: str, *, context: str = "") -> Verdict:
        """The verdict on `text`; it never raises but for cancellation, and takes 1.5 s at most.

        context: what the client already has of the answer, put before `text` for filters that look at more;
        not where the template may rewrite, since a rewrite replaces all that was sent.
        """

    def may_rewrite(self, policy: Policy, stage: Stage) -> bool:
        """Whether the template de-identifies: then a prompt's check must come before the engine sees it."""

    def version(self, policy: Policy, stage: Stage) -> str:
        """Of the template, as far as it is known: verdicts of another version do not count."""

    def pressure(self) -> float:
        """How much of the quota is used up, 0 to 1: larger windows need fewer calls."""

    def refuses(self, policy: Policy, stage: Stage) -> bool:
        """Whether a check now would ask nobody: its verdict, most likely `unchecked`, needs no network."""

    def problem(self) -> str | None:
        """What must be mended before any check can succeed, with the mend. None: nothing."""

    async def close(self) -> None:
        """Checks are unchecked from now on."""
