"""Only what ran and found nothing is clean: the whole table, beside a second reading of the rules."""

import itertools
import random

import pytest
from armor_replies import NAMES, SDP, USUAL, VARIANTS, entry, reply, unknown_entry, usual
from google.cloud import modelarmor_v1 as armor

from cabochon.server.armor import judge as judge_module
from cabochon.server.armor.judge import RAI_TYPES, TemplateFacts, filters_of, judge
from cabochon.server.armor.verdicts import Verdict

FILTERS = frozenset(("rai", "sdp", "pi_and_jailbreak", "malicious_uris", "csam"))
FACTS = TemplateFacts(filters=FILTERS)
STATES = (0, 1, 2, 9)  # 9: an enum value that came after the package
TEXT = "mail bob@x.com now"
MASKED = "mail [EMAIL_ADDRESS] now"


def expected(
    variant: str,
    match: int,
    execution: int,
    invocation: int,
    overall: int,
    facts: TemplateFacts,
    optional: bool,
) -> str:
    """The rules once more, for replies in which only `variant` is not clean."""
    if (match == 2 or overall == 2) and not facts.inspect_only:
        is_masked = (variant, match, execution, invocation, overall) == ("deidentify_result", 2, 1, 1, 2)
        return "rewrite" if is_masked and facts.may_rewrite else "block"
    ran = (match, execution) in ((1, 1), (2, 1))
    agree = overall in (1, 2) if match != 2 else overall == 2
    if ran and agree and invocation == 1 and (facts.inspect_only or overall == 1):
        return "pass"
    is_skipped = execution == 2 and match in (0, 1)
    may_skip = optional and NAMES[variant] in ("rai", "sdp", "malicious_uris")
    return "pass" if is_skipped and may_skip and agree and invocation in (1, 2) else "unchecked"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_filter_match_execution_and_invocation(variant: str) -> None:
    outcomes = set()
    every_facts = [
        TemplateFacts(filters=FILTERS, inspect_only=inspect_only, may_rewrite=may_rewrite)
        for inspect_only in (False, True)
        for may_rewrite in (False, True)
    ]
    more = {"data": {"text": MASKED}} if variant == "deidentify_result" else {}
    for match, execution, invocation, overall in itertools.product(STATES, STATES, (0, 1, 2, 3, 9), STATES):
        changed = {variant: entry(variant, match, execution, **more)}
        result = usual(overall, invocation, **changed)
        for facts, optional in itertools.product(every_facts, (False, True)):
            verdict = judge(result, facts, TEXT, ("rai", "sdp", "malicious_uris") if optional else ())
            case = (match, execution, invocation, overall, facts, optional)
            assert verdict.outcome == expected(variant, *case), case
            assert (verdict.rewritten == MASKED) == (verdict.outcome == "rewrite")
            assert (verdict.reason is not None) == (verdict.outcome == "unchecked")
            outcomes.add(verdict.outcome)
    assert outcomes == {"pass", "block", "unchecked"} | (
        {"rewrite"} if variant == "deidentify_result" else set()
    )


def test_whatever_passes_was_looked_at_and_whatever_matched_is_blocked() -> None:
    rng = random.Random(7)
    seen = {"pass": 0, "block": 0, "unchecked": 0, "rewrite": 0}
    for _ in range(2500):
        usually = [1] * rng.choice((1, 20))  # mostly clean, or anything
        variants = [v for v in VARIANTS if rng.random() < 0.9]
        states = {v: (rng.choice((*usually, *STATES)), rng.choice((*usually, *STATES))) for v in variants}
        entries = {
            v: entry(v, *states[v], **({"data": {"text": MASKED}} if v == SDP[1] else {})) for v in variants
        }
        if is_masked := rng.random() < 0.3:
            states["deidentify_result"] = (2, 1)
            entries["deidentify_result"] = entry("deidentify_result", 2, data={"text": MASKED})
        if rng.random() < 0.1:
            entries["new"] = unknown_entry()
        overall = 2 if is_masked else rng.choice((*usually, *STATES))
        invocation = rng.choice((*usually, 0, 1, 2, 3, 9))
        verdict = judge(reply(entries, overall, invocation), FACTS, TEXT, ("rai", "csam", "pi_and_jailbreak"))
        seen[verdict.outcome] += 1
        has_match = overall == 2 or any(match == 2 for match, _ in states.values())
        assert has_match == (verdict.outcome in ("block", "rewrite"))
        ran = {NAMES[v] for v, state in states.items() if state == (1, 1)}
        if verdict.outcome == "pass":
            assert ran >= FILTERS - {"rai"}
            assert "new" not in entries
            assert invocation == 1 or (invocation == 2 and "rai" not in ran)
        if verdict.outcome == "rewrite":
            assert [v for v, state in states.items() if state[0] == 2] == ["deidentify_result"]
            assert (overall, invocation) == (2, 1)
    assert min(seen["pass"], seen["block"], seen["unchecked"]) > 50
    assert seen["rewrite"] > 0


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "malformed"),
        (armor.SanitizationResult(), "malformed"),
        (reply({}), "malformed"),
        (usual(new=unknown_entry()), "malformed"),
        (usual(new=armor.FilterResult()), "malformed"),
        (usual(sdp=armor.FilterResult(sdp_filter_result={})), "malformed"),
        (usual(invocation=2), "partial"),
        (usual(invocation=3), "partial"),
        (usual(invocation=2, rai_filter_result=entry("rai_filter_result", execution=2)), "partial"),
        (reply({v: entry(v) for v in USUAL if v != "csam_filter_filter_result"}), "partial"),
    ],
)
def test_why_a_text_is_unchecked(result: armor.SanitizationResult | None, reason: str) -> None:
    assert judge(result, FACTS, TEXT) == Verdict(outcome="unchecked", reason=reason)


@pytest.mark.parametrize("variant", USUAL)
def test_a_filter_that_the_template_has_and_the_reply_lacks_did_not_run(variant: str) -> None:
    result = reply({other: entry(other) for other in USUAL if other != variant})
    assert judge(result, FACTS, TEXT).reason == "partial"
    assert judge(result, TemplateFacts(filters=FILTERS - {NAMES[variant]}), TEXT).outcome == "pass"
    is_never = variant in ("csam_filter_filter_result", "pi_and_jailbreak_filter_result")
    verdict = judge(result, FACTS, TEXT, tuple(FILTERS))
    assert verdict.outcome == ("unchecked" if is_never else "pass")


def test_a_reply_in_which_every_filter_was_skipped_is_unchecked_even_if_all_may_be() -> None:
    result = reply({"rai": entry("rai_filter_result", execution=2)}, invocation=2)
    assert judge(result, TemplateFacts(), TEXT, ("rai",)).reason == "partial"


def test_rai_is_split_by_type_and_unknown_types_have_one_name() -> None:
    types = {kind: {"match_state": 2 if kind in ("harassment", "new") else 1} for kind in (*RAI_TYPES, "new")}
    rai = entry("rai_filter_result", 2, rai_filter_type_results=types)
    assert judge(usual(2, rai_filter_result=rai), FACTS, TEXT).filters == ("rai:harassment", "rai:other")
    only_inside = entry("rai_filter_result", 1, rai_filter_type_results=types)
    assert judge(usual(1, rai_filter_result=only_inside), FACTS, TEXT).outcome == "block"
    odd = entry("rai_filter_result", 1, rai_filter_type_results={"dangerous": {"match_state": 9}})
    assert judge(usual(rai_filter_result=odd), FACTS, TEXT).reason == "malformed"


def test_csam_is_read_from_the_field_with_filter_twice() -> None:
    match = usual(2, csam_filter_filter_result=entry("csam_filter_filter_result", 2))
    assert judge(match, FACTS, TEXT) == Verdict(outcome="block", filters=("csam",))


def test_a_rewrite_needs_sdp_alone_a_text_and_a_change() -> None:
    def masked(text: str, **changed: armor.FilterResult) -> armor.SanitizationResult:
        return usual(2, deidentify_result=entry("deidentify_result", 2, data={"text": text}), **changed)

    assert judge(masked(MASKED), FACTS, TEXT) == Verdict(
        outcome="rewrite", rewritten=MASKED, filters=("sdp",)
    )
    assert judge(masked(""), FACTS, TEXT).outcome == "block"
    assert judge(masked(TEXT), FACTS, TEXT).outcome == "block"  # it found something, and left it
    injection = entry("pi_and_jailbreak_filter_result", 2)
    both = judge(masked(MASKED, pi_and_jailbreak_filter_result=injection), FACTS, TEXT)
    assert both == Verdict(outcome="block", filters=("pi_and_jailbreak", "sdp"))


def test_a_template_that_only_inspects_blocks_nothing_and_names_what_matched() -> None:
    facts = TemplateFacts(filters=FILTERS, inspect_only=True)
    result = usual(2, deidentify_result=entry("deidentify_result", 2, data={"text": MASKED}))
    assert judge(result, facts, TEXT) == Verdict(outcome="pass", filters=("sdp",))


def test_filters_of_a_reply_are_those_it_has() -> None:
    result = usual(rai_filter_result=entry("rai_filter_result", execution=2), new=unknown_entry())
    assert filters_of(result) == FILTERS
    assert filters_of(None) == frozenset()


def test_the_numbers_are_those_of_the_package() -> None:
    for kind in (armor.FilterMatchState, armor.InvocationResult, armor.FilterExecutionState):
        for value in kind:
            if value and hasattr(judge_module, value.name):
                assert getattr(judge_module, value.name) == value
    assert (armor.FilterMatchState.MATCH_FOUND, armor.InvocationResult.PARTIAL) == (2, 2)
    assert set(judge_module.FILTERS) == set(armor.FilterResult.pb().DESCRIPTOR.fields_by_name)
