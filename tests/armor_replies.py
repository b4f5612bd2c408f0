"""Replies of Model Armor, made of the package's own messages."""

from typing import Any

from google.cloud import modelarmor_v1 as armor

VARIANTS = (
    "rai_filter_result",
    "pi_and_jailbreak_filter_result",
    "malicious_uri_filter_result",
    "csam_filter_filter_result",
    "virus_scan_filter_result",
    "inspect_result",
    "deidentify_result",
    "redact_result",
)
SDP = ("inspect_result", "deidentify_result", "redact_result")
USUAL = (
    "rai_filter_result",
    "pi_and_jailbreak_filter_result",
    "malicious_uri_filter_result",
    "csam_filter_filter_result",
    "inspect_result",
)
NAMES = {
    "rai_filter_result": "rai",
    "pi_and_jailbreak_filter_result": "pi_and_jailbreak",
    "malicious_uri_filter_result": "malicious_uris",
    "csam_filter_filter_result": "csam",
    "virus_scan_filter_result": "virus_scan",
    **dict.fromkeys(SDP, "sdp"),
}


def entry(variant: str, match: int = 1, execution: int = 1, **more: Any) -> armor.FilterResult:
    """One filter's result; for SDP, `variant` is that of its own oneof."""
    fields = {"match_state": match, "execution_state": execution, **more}
    if variant in SDP:
        return armor.FilterResult(sdp_filter_result={variant: fields})
    return armor.FilterResult({variant: fields})


def unknown_entry() -> armor.FilterResult:
    """Of a filter that came after the package: field 20, an empty message."""
    result: armor.FilterResult = armor.FilterResult.deserialize(b"\xa2\x01\x00")
    return result


def reply(
    entries: dict[str, armor.FilterResult], overall: int = 1, invocation: int = 1
) -> armor.SanitizationResult:
    """A whole result; entries by their key, which says nothing to us."""
    return armor.SanitizationResult(
        filter_match_state=overall, invocation_result=invocation, filter_results=entries
    )


def usual(overall: int = 1, invocation: int = 1, **changed: armor.FilterResult) -> armor.SanitizationResult:
    """The five usual filters, clean but for those given by variant; SDP has one variant."""
    entries = {
        variant: entry(variant) for variant in USUAL if not (variant in SDP and set(SDP) & set(changed))
    }
    return reply({**entries, **changed}, overall, invocation)
