"""What a template does is known before the first check, or assumed to be the worst."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from armor_replies import entry, reply, usual
from fake_armor import MALFORMED, TEMPLATE, FakeArmor, checking, config_for, serving, template
from google.cloud import modelarmor_v1 as armor

from cabochon.server.armor import templates
from cabochon.server.armor.connections import Connections, UnclearReply
from cabochon.server.armor.judge import TemplateFacts
from cabochon.server.armor.templates import Templates, Use, facts_of
from cabochon.server.armor.verdicts import Verdict

Code = grpc.StatusCode
FIVE = frozenset(("rai", "sdp", "pi_and_jailbreak", "malicious_uris", "csam"))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("config", "filters"),
    [
        ({}, {"csam"}),
        ({"rai_settings": {}}, {"csam"}),
        ({"rai_settings": {"rai_filters": [{"filter_type": 2}]}}, {"rai", "csam"}),
        ({"sdp_settings": {"basic_config": {"filter_enforcement": 1}}}, {"sdp", "csam"}),
        ({"sdp_settings": {"basic_config": {"filter_enforcement": 2}}}, {"csam"}),
        ({"sdp_settings": {"advanced_config": {"inspect_template": "i"}}}, {"sdp", "csam"}),
        ({"pi_and_jailbreak_filter_settings": {"filter_enforcement": 1}}, {"pi_and_jailbreak", "csam"}),
        ({"pi_and_jailbreak_filter_settings": {"filter_enforcement": 9}}, {"pi_and_jailbreak", "csam"}),
        ({"pi_and_jailbreak_filter_settings": {"filter_enforcement": 2}}, {"csam"}),
        ({"malicious_uri_filter_settings": {"filter_enforcement": 1}}, {"malicious_uris", "csam"}),
    ],
)
def test_filters_are_those_that_are_on_and_csam_where_there_is_one(config: Any, filters: set[str]) -> None:
    assert facts_of(armor.Template(filter_config=config), usual()).filters == filters
    probe = reply({"rai": entry("rai_filter_result")})
    assert facts_of(armor.Template(filter_config=config), probe).filters == filters - {"csam"}


def test_only_a_template_that_masks_and_enforces_rewrites() -> None:
    cases = {(False, False): False, (True, False): True, (True, True): False, (False, True): False}
    for (masks, inspect_only), may_rewrite in cases.items():
        facts = facts_of(template(masks=masks, inspect_only=inspect_only), usual())
        assert (facts.may_rewrite, facts.inspect_only) == (may_rewrite, inspect_only)
        assert facts.filters == FIVE


def test_a_template_that_cannot_be_read_has_the_safe_facts() -> None:
    assert facts_of(None, usual()) == TemplateFacts(filters=FIVE, may_rewrite=True, inspect_only=False)


@pytest.mark.parametrize(
    ("read", "probe"),
    [(template(), None), (template(), reply({})), (None, usual(invocation=2)), (None, None)],
)
def test_a_probe_that_says_nothing_gives_no_facts(read: Any, probe: Any) -> None:
    with pytest.raises(UnclearReply):
        facts_of(read, probe)


def test_another_version_of_template_or_filters_is_another_version_of_the_facts() -> None:
    edited = template()
    edited.update_time = {"seconds": 7}
    newer = usual()
    newer.sanitization_metadata.filter_version_config.filter_version = "v4"
    cases = [(template(), usual()), (edited, usual()), (template(), newer), (None, newer)]
    assert len({facts_of(*case).version for case in cases}) == 4


def test_each_use_is_asked_about_once_at_start() -> None:
    async def scenario() -> None:
        async with checking() as world:
            assert (world.fake.num_reads, world.fake.num_probes) == (2, 2)
            for n in range(3):
                await world.checker.check(world.config.default_policy, "response", str(n))
            assert (world.fake.num_reads, world.fake.num_probes) == (2, 2)
            assert world.checker.problem() is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (Code.PERMISSION_DENIED, "must be allowed to sanitize with .*roles/modelarmor.user"),
        (Code.UNAUTHENTICATED, "must be allowed to sanitize with .*credentials"),
        (Code.NOT_FOUND, "must be a template that Model Armor has .*create it"),
        (Code.INVALID_ARGUMENT, "must be a template that Model Armor has"),
    ],
)
def test_what_is_set_up_wrongly_is_a_problem_until_it_is_right(
    code: grpc.StatusCode, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RETRY_S", 0.05)

    async def scenario() -> None:
        async with checking(FakeArmor(probe=code, template=code)) as world:
            problem = world.checker.problem() or ""
            assert TEMPLATE in problem
            assert re.search(words, problem)
            world.fake.probe, world.fake.template = usual(), template()
            async with asyncio.timeout(5):
                while world.checker.problem() is not None:
                    await asyncio.sleep(0.02)

    asyncio.run(scenario())


@pytest.mark.parametrize("probe", [Code.UNAVAILABLE, Code.INTERNAL, Code.RESOURCE_EXHAUSTED, MALFORMED])
def test_an_outage_at_start_is_no_problem_but_checks_wait_for_the_facts(probe: Any) -> None:
    async def scenario() -> None:
        async with checking(FakeArmor(probe=probe)) as world:
            policy = world.config.default_policy
            assert world.checker.problem() is None
            assert (await world.checker.check(policy, "prompt", "x")).outcome == "unchecked"
            assert world.fake.texts == []
            world.fake.probe = usual()
            if probe is not Code.RESOURCE_EXHAUSTED:  # that one emptied the bucket
                assert await world.checker.check(policy, "prompt", "x") == Verdict(outcome="pass")
                assert not world.checker.may_rewrite(policy, "prompt")

    asyncio.run(scenario())


@pytest.mark.parametrize("read", [Code.PERMISSION_DENIED, Code.UNAVAILABLE, MALFORMED])
def test_who_may_only_sanitize_is_served_with_the_safe_facts_and_a_warning(
    read: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with checking(FakeArmor(template=read)) as world:
            policy = world.config.default_policy
            assert world.checker.problem() is None
            assert world.checker.may_rewrite(policy, "prompt")
            assert await world.checker.check(policy, "response", "x", context="y") == Verdict(outcome="pass")
            assert world.fake.texts == ["x"]

    asyncio.run(scenario())
    warnings = [
        record.getMessage() for record in caplog.records if "modelarmor.templates.get" in record.message
    ]
    assert len(warnings) == 1


def test_facts_are_asked_again_and_those_of_before_hold_through_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(templates, "REFRESH_S", 0.05)

    async def scenario() -> None:
        async with checking() as world:
            policy = world.config.default_policy
            assert not world.checker.may_rewrite(policy, "prompt")
            world.fake.probe = Code.PERMISSION_DENIED
            before = world.fake.num_probes
            await until(lambda: world.fake.num_probes >= before + 4)
            assert world.checker.problem() is None
            assert not world.checker.may_rewrite(policy, "prompt")
            world.fake.probe, world.fake.template = usual(), template(masks=True)
            await until(lambda: world.checker.may_rewrite(policy, "prompt"))

    asyncio.run(scenario())


def test_a_problem_of_a_policy_that_is_gone_is_none_and_new_ones_are_asked_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(templates, "RETRY_S", 0.05)

    async def scenario() -> None:
        async with serving(FakeArmor(probe=Code.NOT_FOUND)) as port:
            connections = Connections(config_for(port))
            probes: list[None] = []
            asked = Templates(connections, lambda: probes.append(None))
            uses = {Use(TEMPLATE, "prompt")}
            try:
                await asked.start(lambda: uses)
                assert asked.problem() is not None
                uses = {Use(TEMPLATE, "response")}
                before = len(probes)
                await until(lambda: asked.problem() is None)
                assert len(probes) > before
            finally:
                await asked.close()
                await connections.close()

    asyncio.run(scenario())


def test_nothing_ends_the_refreshing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither an error of what gives the uses, nor the service's own status CANCELLED."""
    monkeypatch.setattr(templates, "REFRESH_S", 0.05)

    async def scenario() -> None:
        fake, fails = FakeArmor(), False
        async with serving(fake) as port:
            connections = Connections(config_for(port))
            asked = Templates(connections, lambda: None)

            def uses() -> set[Use]:
                if fails:
                    raise RuntimeError("sk-canary")
                return {Use(TEMPLATE, "prompt")}

            try:
                await asked.start(uses)
                fake.probe, before = Code.CANCELLED, fake.num_probes
                await until(lambda: fake.num_probes >= before + 2)
                fails = True
                await until(lambda: "not asked about error=RuntimeError" in caplog.text)
                fails, before = False, fake.num_probes
                await until(lambda: fake.num_probes >= before + 2)
            finally:
                await asked.close()
                await connections.close()

    asyncio.run(scenario())
    assert "canary" not in caplog.text


def test_a_use_is_a_template_and_a_stage() -> None:
    assert Use(TEMPLATE, "prompt") != Use(TEMPLATE, "response")
