"""What a reply of Model Armor says of a text. Closed: what is not understood, or did not run, is never clean.

It reads plain numbers and field names, so that values which the package does not know yet are seen as what
they are. Constants are those of google.cloud.modelarmor_v1; a test holds them to it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cabochon.server.armor.config import MAY_BE_OPTIONAL
from cabochon.server.armor.verdicts import Reason, Verdict

NO_MATCH_FOUND, MATCH_FOUND = 1, 2  # FilterMatchState
SUCCESS, PARTIAL, FAILURE = 1, 2, 3  # InvocationResult
EXECUTION_SUCCESS, EXECUTION_SKIPPED = 1, 2  # FilterExecutionState
FILTERS = {
    "rai_filter_result": "rai",
    "sdp_filter_result": "sdp",
    "pi_and_jailbreak_filter_result": "pi_and_jailbreak",
    "malicious_uri_filter_result": "malicious_uris",
    "csam_filter_filter_result": "csam",  # "filter" twice: that is the field's name
    "virus_scan_filter_result": "virus_scan",
}
RAI_TYPES = ("sexually_explicit", "hate_speech", "harassment", "dangerous", "violence", "sexually_suggestive")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """What is known of a template. Where it cannot be read, the defaults hold: they are the safe ones."""

    filters: frozenset[str] = frozenset()  # each must be in a reply and have run, or the text is unchecked
    may_rewrite: bool = True  # it de-identifies
    inspect_only: bool = False  # matches are counted and block nothing
    version: str = ""  # another one when template or filters change


class _Entry(NamedTuple):
    """One filter's result. `unclear`: a value or variant that is unknown to the package, or unset."""

    name: str | None
    state: Literal["clean", "matched", "skipped", "unclear"]
    matched: tuple[str, ...] = ()
    rewritten: str = ""


def judge(
    result: Any | None, facts: TemplateFacts, text: str, optional_filters: Collection[str] = ()
) -> Verdict:
    """The verdict on `text`.

    result: a SanitizationResult of the package, or None if the reply could not be decoded.
    A match blocks, in a partial result too; it rewrites if it is SDP's alone, everything ran and the template
    is known to de-identify; where the template only inspects, it is named in a `pass`. Otherwise the text
    passes if each filter of `facts` ran and found nothing, but for `optional_filters`, which may be skipped
    or missing.
    """
    if result is None:
        return Verdict(outcome="unchecked", reason="malformed")
    raw = result._pb
    entries = [_read(entry) for entry in raw.filter_results.values()]
    matched = tuple(sorted({name for entry in entries for name in entry.matched}))
    if raw.filter_match_state == MATCH_FOUND and not matched:
        matched = ("unknown",)
    reason = _why_unchecked(raw, entries, bool(matched), facts.filters, optional_filters)
    if matched and not facts.inspect_only:
        rewritten = _rewrite_of(entries)
        if reason is None and facts.may_rewrite and rewritten and rewritten != text:
            return Verdict(outcome="rewrite", rewritten=rewritten, filters=matched)
        return Verdict(outcome="block", filters=matched)
    if reason is not None:
        return Verdict(outcome="unchecked", reason=reason)
    return Verdict(outcome="pass", filters=matched)


def filters_of(result: Any | None) -> frozenset[str]:
    """Names of the filters that a reply has, skipped or not."""
    entries = [] if result is None else [_read(entry) for entry in result._pb.filter_results.values()]
    return frozenset(entry.name for entry in entries if entry.name)


def _why_unchecked(
    raw: Any, entries: Sequence[_Entry], has_match: bool, required: Collection[str], optional: Collection[str]
) -> Reason | None:
    """None if all that must run has run, and said something that we know."""
    if raw.filter_match_state != (MATCH_FOUND if has_match else NO_MATCH_FOUND):
        return "malformed"
    if not entries or any(entry.state == "unclear" for entry in entries):
        return "malformed"
    if raw.invocation_result not in (SUCCESS, PARTIAL, FAILURE):
        return "malformed"
    ran = {entry.name for entry in entries if entry.state in ("clean", "matched")}
    not_run = {entry.name for entry in entries if entry.state == "skipped"} | (set(required) - ran)
    if raw.invocation_result == FAILURE or not ran:
        return "partial"
    if raw.invocation_result == PARTIAL and not not_run:
        return "partial"  # something failed, and the reply does not say what
    return "partial" if not_run - (set(optional) & set(MAY_BE_OPTIONAL)) else None


def _read(entry: Any) -> _Entry:
    """entry: a FilterResult, as protobuf has it."""
    variant = entry.WhichOneof("filter_result")
    name = FILTERS.get(variant)
    if name is None:
        return _Entry(None, "unclear")
    found = getattr(entry, variant)
    rewritten = ""
    if name == "sdp":
        inner = found.WhichOneof("result")
        if inner is None:
            return _Entry(name, "unclear")
        found = getattr(found, inner)
        rewritten = found.data.text if inner == "deidentify_result" else ""
    types = found.rai_filter_type_results if name == "rai" else {}
    states = [found.match_state, *(kind.match_state for kind in types.values())]
    if MATCH_FOUND in states:
        if found.execution_state != EXECUTION_SUCCESS or not set(states) <= {NO_MATCH_FOUND, MATCH_FOUND}:
            return _Entry(name, "unclear", _matched(name, types))
        return _Entry(name, "matched", _matched(name, types), rewritten)
    if found.execution_state == EXECUTION_SKIPPED and set(states) <= {0, NO_MATCH_FOUND}:
        return _Entry(name, "skipped")
    is_clean = found.execution_state == EXECUTION_SUCCESS and set(states) == {NO_MATCH_FOUND}
    return _Entry(name, "clean" if is_clean else "unclear")


def _matched(name: str, types: Any) -> tuple[str, ...]:
    """The filter's name; RAI's by type, of a closed list, since they become labels of metrics."""
    kinds = [kind for kind, found in types.items() if found.match_state == MATCH_FOUND]
    return tuple(f"rai:{kind if kind in RAI_TYPES else 'other'}" for kind in kinds) or (name,)


def _rewrite_of(entries: Sequence[_Entry]) -> str:
    """The de-identified text, if all others are clean; else an empty one."""
    others = [entry for entry in entries if entry.state != "clean"]
    return others[0].rewritten if len(others) == 1 else ""
