"""The emulator's verdict on a text as the service sends it: every filter's result, in the real protos."""

from collections.abc import Collection
from typing import Any

from google.cloud import modelarmor_v1 as armor

from cabochon.server.armor.emulator_detectors import (
    Finding,
    count_tokens,
    deidentify,
    find_malicious_urls,
    find_personal_data,
    find_rai,
    has_csam,
    has_injection,
)
from cabochon.server.armor.emulator_faults import Fault
from cabochon.server.armor.emulator_templates import ALWAYS, TemplateSpec

TOKEN_LIMIT = 65_536  # of injection, RAI and CSAM
SDP_TOKEN_LIMIT = 130_000
UNKNOWN_ENUM = 9  # no enum of version 1 has it
UNKNOWN_FILTER = "telepathy"
FILTER_VERSION = "emulator"
RAI_TYPES = {
    "sexually_explicit": armor.RaiFilterType.SEXUALLY_EXPLICIT,
    "hate_speech": armor.RaiFilterType.HATE_SPEECH,
    "harassment": armor.RaiFilterType.HARASSMENT,
    "dangerous": armor.RaiFilterType.DANGEROUS,
}
MATCH, NO_MATCH = armor.FilterMatchState.MATCH_FOUND, armor.FilterMatchState.NO_MATCH_FOUND
EXECUTED, SKIPPED = armor.FilterExecutionState.EXECUTION_SUCCESS, armor.FilterExecutionState.EXECUTION_SKIPPED
STABLE = armor.FilterVersionAlias.FILTER_VERSION_ALIAS_STABLE
HIGH = armor.DetectionConfidenceLevel.HIGH
_UNKNOWN_FIELD = b"\x7a\x00"  # field 15, an empty message: a filter of a later version


def raw(kind: Any) -> Any:
    """The protobuf class below one of proto-plus, whose objects take several times as long to make."""
    return type(kind.pb(kind()))


FilterResult, SanitizationResult = raw(armor.FilterResult), raw(armor.SanitizationResult)
SanitizationMetadata = raw(armor.SanitizationResult.SanitizationMetadata)
FilterVersionConfig = raw(armor.FilterVersionConfig)
MessageItem, RangeInfo = raw(armor.MessageItem), raw(armor.RangeInfo)
CsamFilterResult = raw(armor.CsamFilterResult)
PiAndJailbreakFilterResult = raw(armor.PiAndJailbreakFilterResult)
RaiFilterResult = raw(armor.RaiFilterResult)
RaiFilterTypeResult = raw(armor.RaiFilterResult.RaiFilterTypeResult)
MaliciousUriFilterResult = raw(armor.MaliciousUriFilterResult)
MaliciousUriMatchedItem = raw(armor.MaliciousUriFilterResult.MaliciousUriMatchedItem)
SdpFilterResult, SdpInspectResult = raw(armor.SdpFilterResult), raw(armor.SdpInspectResult)
SdpDeidentifyResult, SdpFinding = raw(armor.SdpDeidentifyResult), raw(armor.SdpFinding)
SdpFindingLocation = raw(armor.SdpFinding.SdpFindingLocation)


def sanitize(
    text: str, template: TemplateSpec, fault: Fault | None = None, *, is_stream: bool = False
) -> Any:
    """The verdict of `template` on `text`, a SanitizationResult of protobuf, spoiled by a fault of CONTENT.

    is_stream: a chunk of a streaming call, where nothing is de-identified.
    """
    if fault is not None and fault.kind == "empty":
        return SanitizationResult()
    judge = _Judge(text, _not_run(template, fault))
    for name in sorted(template.filters):
        judge.run(name, has_deidentify=template.has_deidentify and not is_stream)
    result = SanitizationResult(
        filter_match_state=MATCH if judge.has_match else NO_MATCH,
        invocation_result=judge.invocation_result(),
        sanitization_metadata=SanitizationMetadata(
            ignore_partial_invocation_failures=template.ignores_partial,
            filter_version_config=FilterVersionConfig(
                filter_version=FILTER_VERSION, filter_version_alias=STABLE
            ),
        ),
    )
    for name, one in judge.results.items():
        result.filter_results[name].CopyFrom(one)
    if fault is not None:
        _spoil(result, fault, template)
    return result


class _Judge:
    """Runs filters on one text. Each result's state is in `has_match` and `num_skipped`, too."""

    def __init__(self, text: str, not_run: Collection[str]) -> None:
        self.text = text
        self.num_tokens = count_tokens(text)
        self.not_run = not_run
        self.results: dict[str, Any] = {}
        self.has_match = False
        self.num_skipped = 0

    def run(self, name: str, *, has_deidentify: bool) -> None:
        """Add the result of the filter of that name."""
        self.results[name] = {
            "rai": self._rai,
            "csam": self._csam,
            "malicious_uris": self._malicious_uris,
            "pi_and_jailbreak": self._injection,
            "sdp": self._deidentify if has_deidentify else self._inspect,
        }[name]()

    def invocation_result(self) -> int:
        """Of all filters that were to run."""
        if self.num_skipped == 0:
            return armor.InvocationResult.SUCCESS
        is_all = self.num_skipped == len(self.results)
        return armor.InvocationResult.FAILURE if is_all else armor.InvocationResult.PARTIAL

    def _state(self, name: str, is_found: bool, limit_tokens: int | None = None) -> dict[str, Any]:
        """The fields that all results share. Above its limit a filter still says what it has found."""
        is_long = limit_tokens is not None and self.num_tokens > limit_tokens
        is_skipped = name in self.not_run or (is_long and not is_found)
        is_match = is_found and not is_skipped
        self.has_match |= is_match
        self.num_skipped += is_skipped
        messages = []
        if is_skipped:
            why = "The filter did not run." if name in self.not_run else "The token limit is exceeded."
            messages.append(MessageItem(message=why))
        return {
            "match_state": MATCH if is_match else NO_MATCH,
            "execution_state": SKIPPED if is_skipped else EXECUTED,
            "message_items": messages,
        }

    def _rai(self) -> Any:
        found = find_rai(self.text)
        state = self._state("rai", bool(found), TOKEN_LIMIT)
        is_skipped = state["execution_state"] == SKIPPED
        kinds = {
            kind: RaiFilterTypeResult(
                filter_type=number,
                match_state=MATCH if kind in found else NO_MATCH,
                confidence_level=HIGH if kind in found else 0,
            )
            for kind, number in RAI_TYPES.items()
            if not is_skipped
        }
        result = RaiFilterResult(**state, rai_filter_type_results=kinds)
        return FilterResult(rai_filter_result=result)

    def _csam(self) -> Any:
        result = CsamFilterResult(**self._state("csam", has_csam(self.text), TOKEN_LIMIT))
        return FilterResult(csam_filter_filter_result=result)  # "filter" twice: that is its name

    def _malicious_uris(self) -> Any:
        found = find_malicious_urls(self.text)
        state = self._state("malicious_uris", bool(found))
        is_match = state["match_state"] == MATCH
        items = [
            MaliciousUriMatchedItem(uri=one.kind, locations=[RangeInfo(start=one.start, end=one.end)])
            for one in found
            if is_match
        ]
        result = MaliciousUriFilterResult(**state, malicious_uri_matched_items=items)
        return FilterResult(malicious_uri_filter_result=result)

    def _injection(self) -> Any:
        state = self._state("pi_and_jailbreak", has_injection(self.text), TOKEN_LIMIT)
        confidence = HIGH if state["match_state"] == MATCH else 0
        result = PiAndJailbreakFilterResult(**state, confidence_level=confidence)
        return FilterResult(pi_and_jailbreak_filter_result=result)

    def _inspect(self) -> Any:
        found = find_personal_data(self.text)
        state = self._state("sdp", bool(found), SDP_TOKEN_LIMIT)
        findings = _findings(self.text, found) if state["match_state"] == MATCH else []
        result = SdpInspectResult(**state, findings=findings)
        return FilterResult(sdp_filter_result=SdpFilterResult(inspect_result=result))

    def _deidentify(self) -> Any:
        found = find_personal_data(self.text)
        state = self._state("sdp", bool(found), SDP_TOKEN_LIMIT)
        result = SdpDeidentifyResult(**state)
        if state["execution_state"] == EXECUTED:
            result.data.text = deidentify(self.text, found)
            result.transformed_bytes = sum(_num_bytes(self.text[one.start : one.end]) for one in found)
            result.info_types.extend(sorted({one.kind for one in found}))
        return FilterResult(sdp_filter_result=SdpFilterResult(deidentify_result=result))


def _findings(text: str, found: list[Finding]) -> list[Any]:
    rows = []
    at, at_bytes = 0, 0
    for one in found:
        start_bytes = at_bytes + _num_bytes(text[at : one.start])
        at, at_bytes = one.end, start_bytes + _num_bytes(text[one.start : one.end])
        where = SdpFindingLocation(
            byte_range=RangeInfo(start=start_bytes, end=at_bytes),
            codepoint_range=RangeInfo(start=one.start, end=one.end),
        )
        likely = armor.SdpFindingLikelihood.VERY_LIKELY
        rows.append(SdpFinding(info_type=one.kind, likelihood=likely, location=where))
    return rows


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _not_run(template: TemplateSpec, fault: Fault | None) -> frozenset[str]:
    if fault is None or fault.kind not in ("partial", "failure"):
        return frozenset()
    return template.filters if fault.kind == "failure" else frozenset({_subject(template, fault)})


def _subject(template: TemplateSpec, fault: Fault) -> str:
    """The filter that a fault is about."""
    return fault.filter if fault.filter in template.filters else ALWAYS


def _spoil(result: Any, fault: Fault, template: TemplateSpec) -> None:
    name = _subject(template, fault)
    if fault.kind == "missing":
        del result.filter_results[name]
    elif fault.kind == "unknown_filter":
        result.filter_results[UNKNOWN_FILTER].MergeFromString(_UNKNOWN_FIELD)
    elif fault.kind == "unknown_enum":
        if result.filter_match_state == NO_MATCH:
            result.filter_match_state = UNKNOWN_ENUM
        _inner(result.filter_results[name]).match_state = UNKNOWN_ENUM


def _inner(message: Any) -> Any:
    """The message with the states: below each oneof, of SDP below two."""
    while oneofs := message.DESCRIPTOR.oneofs:
        message = getattr(message, message.WhichOneof(oneofs[0].name))
    return message
