"""Whatever the service does, a verdict comes, in time, and without a word of the text anywhere else."""

import asyncio
import builtins
import logging
import time
from typing import Any

import grpc
import pytest
from armor_replies import entry, unknown_entry, usual
from fake_armor import MALFORMED, TEMPLATE, FakeArmor, checking, config_for, serving, template
from google.auth.credentials import AnonymousCredentials
from prometheus_client import CollectorRegistry, generate_latest

from cabochon.engine.errors import ConfigError
from cabochon.server.armor import breaker
from cabochon.server.armor.client import MAX_CHARS, OVERLAP_CHARS, ArmorChecker, split
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.connections import Connections
from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.policies import Policies
from cabochon.server.armor.verdicts import Policy, Verdict

Code = grpc.StatusCode
PASS = Verdict(outcome="pass")
CANARY = "canary-4471-delta"
MASKED = usual(2, deidentify_result=entry("deidentify_result", 2, data={"text": "mail [EMAIL]"}))
REASONS = {
    Code.DEADLINE_EXCEEDED: "timeout",
    Code.RESOURCE_EXHAUSTED: "quota",
    Code.PERMISSION_DENIED: "denied",
    Code.UNAUTHENTICATED: "denied",
    Code.NOT_FOUND: "invalid",
    Code.INVALID_ARGUMENT: "invalid",
}


def unchecked(reason: Any) -> Verdict:
    return Verdict(outcome="unchecked", reason=reason)


def test_a_prompt_and_an_answer_are_asked_about_with_their_own_methods() -> None:
    async def scenario() -> None:
        async with checking() as world:
            policy = world.config.default_policy
            assert await world.checker.check(policy, "prompt", "hello") == PASS
            assert await world.checker.check(policy, "response", "world", context="so ") == PASS
            assert world.fake.texts == ["hello", "so world"]
            assert world.fake.stages == ["prompt", "response"]
            assert world.fake.metadata["x-goog-request-params"].endswith("templates/t")
            assert world.metric("checks_total", stage="prompt", outcome="pass") == 1
            assert world.metric("check_seconds_count", stage="response") == 1
            assert world.metric("scanned_chars_total", stage="response") == 8

    asyncio.run(scenario())


def test_plain_text_takes_no_way_round_by_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody is

    async def scenario() -> None:
        async with checking() as world:
            assert await world.checker.check(world.config.default_policy, "prompt", "hello") == PASS

    asyncio.run(scenario())


def test_matches_block_and_are_counted_by_filter() -> None:
    async def scenario() -> None:
        fake = FakeArmor([usual(2, csam_filter_filter_result=entry("csam_filter_filter_result", 2))])
        async with checking(fake) as world:
            verdict = await world.checker.check(world.config.default_policy, "prompt", "x")
            assert verdict == Verdict(outcome="block", filters=("csam",))
            assert world.metric("blocked_total", stage="prompt", filter="csam") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("masks", [False, True])
def test_a_template_that_rewrites_gets_no_context_and_the_other_no_rewrite(masks: bool) -> None:
    async def scenario() -> None:
        async with checking(FakeArmor([MASKED], template=template(masks=masks))) as world:
            policy = world.config.default_policy
            assert world.checker.may_rewrite(policy, "response") is masks
            verdict = await world.checker.check(policy, "response", "mail b@x.com", context="so ")
            assert world.fake.texts == ["mail b@x.com" if masks else "so mail b@x.com"]
            rewrite = Verdict(outcome="rewrite", rewritten="mail [EMAIL]", filters=("sdp",))
            assert verdict == (rewrite if masks else Verdict(outcome="block", filters=("sdp",)))

    asyncio.run(scenario())


def test_without_a_template_or_without_a_word_nothing_is_asked() -> None:
    async def scenario() -> None:
        async with checking() as world:
            assert await world.checker.check(Policy(), "prompt", "hello") == PASS
            assert await world.checker.check(world.config.default_policy, "response", " \n") == PASS
            assert world.fake.texts == []
            assert not world.checker.may_rewrite(Policy(), "prompt")

    asyncio.run(scenario())


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_every_status_is_a_reason(code: grpc.StatusCode) -> None:
    async def scenario() -> None:
        async with checking(FakeArmor([code])) as world:
            verdict = await world.checker.check(world.config.default_policy, "response", "hello")
            reason = REASONS.get(code, "unavailable")
            assert verdict == unchecked(reason)
            assert len(world.fake.texts) == (2 if code is Code.UNAVAILABLE else 1)
            assert world.metric("unchecked_total", reason=reason, policy="closed") == 1
            for _ in range(4):
                await world.checker.check(world.config.default_policy, "response", "hello")
            is_open = world.metric("breaker_state") == 2
            quiet = (Code.PERMISSION_DENIED, Code.NOT_FOUND, Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED)
            assert is_open == (code not in quiet)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (MALFORMED, "malformed"),
        (b"", "malformed"),
        (usual(invocation=2), "partial"),
        (usual(invocation=3), "partial"),
        (usual(new=unknown_entry()), "malformed"),
    ],
)
def test_replies_that_say_nothing_are_unchecked(answer: Any, reason: str) -> None:
    async def scenario() -> None:
        async with checking(FakeArmor([answer])) as world:
            assert await world.checker.check(world.config.default_policy, "prompt", "x") == unchecked(reason)

    asyncio.run(scenario())


def test_one_refusal_is_tried_again() -> None:
    async def scenario() -> None:
        async with checking(FakeArmor([Code.UNAVAILABLE, usual()])) as world:
            assert await world.checker.check(world.config.default_policy, "prompt", "x") == PASS
            assert len(world.fake.texts) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", [Code.UNAVAILABLE, 60.0])
def test_the_total_time_holds_while_the_service_is_down_or_silent(answer: Any) -> None:
    async def scenario() -> None:
        async with checking(FakeArmor([answer])) as world:
            started = time.monotonic()
            verdicts = await asyncio.gather(
                world.checker.check(world.config.default_policy, "prompt", "x"),
                world.checker.check(world.config.default_policy, "response", "y"),
            )
            reason = "timeout" if answer == 60.0 else "unavailable"
            assert verdicts == [unchecked(reason)] * 2
            assert time.monotonic() - started < 1.7

    asyncio.run(scenario())


def test_the_time_holds_while_even_the_facts_of_the_template_do_not_come() -> None:
    async def scenario() -> None:
        fake = FakeArmor(probe=Code.UNAVAILABLE)
        async with checking(fake, armor_prompt_timeout_s=0.2) as world:
            fake.probe = 60.0
            started = time.monotonic()
            verdict = await world.checker.check(world.config.default_policy, "prompt", "x")
            assert verdict == unchecked("timeout")
            assert time.monotonic() - started < 1.7

    asyncio.run(scenario())


def test_a_retry_has_what_is_left_of_the_total() -> None:
    async def scenario() -> None:
        fake = FakeArmor([0.3, Code.UNAVAILABLE])
        limits = {"armor_prompt_timeout_s": 0.4, "armor_window_timeout_s": 0.4, "armor_total_timeout_s": 0.5}
        async with checking(fake, **limits) as world:
            fake.answers = [Code.UNAVAILABLE, 60.0]
            started = time.monotonic()
            assert await world.checker.check(world.config.default_policy, "prompt", "x") == unchecked(
                "timeout"
            )
            assert 0.35 < time.monotonic() - started < 0.8

    asyncio.run(scenario())


def test_nobody_there_is_unavailable_and_a_restart_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "OPEN_S", 0.2)

    async def scenario() -> None:
        fake = FakeArmor()
        async with serving(fake) as port:
            pass  # and gone again
        config = config_for(port)
        checker = ArmorChecker(config, Policies(config), GuardMetrics(CollectorRegistry()))
        try:
            await checker.start()
            assert checker.problem() is None  # an outage, not a mistake
            assert checker.may_rewrite(config.default_policy, "prompt")  # not known yet: the safe answer
            started = time.monotonic()
            assert await checker.check(config.default_policy, "prompt", "x") == unchecked("unavailable")
            assert time.monotonic() - started < 1.7
            async with serving(fake, port):
                for _ in range(60):
                    verdict = await checker.check(config.default_policy, "prompt", "x")
                    if verdict == PASS:
                        break
                    await asyncio.sleep(0.1)
            assert verdict == PASS
            assert not checker.may_rewrite(config.default_policy, "prompt")
        finally:
            await checker.close()

    asyncio.run(scenario())


def test_who_goes_cancels_the_call_and_leaves_no_trace() -> None:
    async def scenario() -> None:
        async with checking(FakeArmor([60.0])) as world:
            for stage in ("prompt", "response"):
                task = asyncio.create_task(world.checker.check(world.config.default_policy, stage, "x"))
                await asyncio.sleep(0.05)
                assert world.metric("inflight") == 1
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await asyncio.sleep(0)
                assert world.metric("inflight") == 0
            assert world.metric("breaker_state") == 0

    asyncio.run(scenario())


def test_an_open_breaker_answers_at_once_and_asks_nobody() -> None:
    async def scenario() -> None:
        async with checking(FakeArmor([Code.INTERNAL])) as world:
            policy = world.config.default_policy
            assert not world.checker.refuses(policy, "prompt")
            verdicts = [await world.checker.check(policy, "prompt", str(n)) for n in range(7)]
            assert world.checker.refuses(policy, "prompt")
            assert not world.checker.refuses(Policy(), "prompt")
            assert verdicts == [unchecked("unavailable")] * 5 + [unchecked("breaker")] * 2
            assert len(world.fake.texts) == 5

    asyncio.run(scenario())


def test_calls_never_exceed_the_bucket_and_a_refusal_empties_it() -> None:
    async def scenario() -> None:
        async with checking(armor_quota_per_min=100) as world:  # a bucket of 10, two went for the probes
            policy = world.config.default_policy
            asked = [world.checker.check(policy, "prompt", str(n)) for n in range(12)]
            verdicts = await asyncio.gather(*asked)
            assert (verdicts.count(PASS), verdicts.count(unchecked("quota"))) == (8, 4)
            assert len(world.fake.texts) == 8
            assert world.checker.pressure() > 0.9
        async with checking(FakeArmor([Code.RESOURCE_EXHAUSTED])) as world:
            await world.checker.check(policy, "prompt", "x")
            assert world.checker.pressure() > 0.99
            assert world.metric("quota_available") < 1

    asyncio.run(scenario())


def test_a_prompt_is_asked_about_once_but_for_another_policy_or_template() -> None:
    async def scenario() -> None:
        async with checking() as world:
            policy = world.config.default_policy
            other = Policy(prompt_template=TEMPLATE, optional_filters=("rai",))
            verdicts = [await world.checker.check(one, "prompt", "x") for one in (policy, policy, other)]
            assert verdicts == [PASS] * 3
            assert len(world.fake.texts) == 2
            for _ in range(2):
                await world.checker.check(policy, "response", "x")
            assert len(world.fake.texts) == 4
            assert world.metric("checks_total", stage="prompt", outcome="pass") == 3

    asyncio.run(scenario())


def test_long_texts_are_split_at_blanks_with_an_overlap() -> None:
    text = "word " * 110_000
    parts = split(text)
    assert [len(part) <= MAX_CHARS for part in parts] == [True] * 3
    assert all(part.endswith(" ") for part in parts)
    assert parts[0] + "".join(part[OVERLAP_CHARS:] for part in parts[1:]) == text
    solid = "x" * (MAX_CHARS + 1)
    assert split(solid) == [solid[:MAX_CHARS], solid[MAX_CHARS - OVERLAP_CHARS :]]
    assert split("x" * MAX_CHARS) == ["x" * MAX_CHARS]


def test_all_parts_must_pass_and_none_is_rewritten() -> None:
    async def scenario() -> None:
        block = usual(2, pi_and_jailbreak_filter_result=entry("pi_and_jailbreak_filter_result", 2))
        text = "word " * 50_000
        async with checking(FakeArmor(template=template(masks=True)), armor_cache_s=0.0) as world:
            for answers, expected in (
                ([usual()], PASS),
                ([usual(), block], Verdict(outcome="block", filters=("pi_and_jailbreak",))),
                ([MASKED, usual()], Verdict(outcome="block", filters=("sdp",))),
                ([usual(), Code.INTERNAL], unchecked("unavailable")),
                ([Code.INTERNAL, block], Verdict(outcome="block", filters=("pi_and_jailbreak",))),
            ):
                world.fake.answers, world.fake.texts = [*answers], []
                assert await world.checker.check(world.config.default_policy, "prompt", text) == expected
                assert len(world.fake.texts) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", [usual(), MASKED, MALFORMED, Code.INVALID_ARGUMENT, Code.INTERNAL, 2.0])
def test_no_text_is_in_a_log_or_a_metric(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        logging.getLogger("google").propagate = True  # as google's set-up of logs may do
        fake = FakeArmor([answer], template=template(masks=True, logs=True))
        async with checking(fake, armor_prompt_timeout_s=0.2, armor_window_timeout_s=0.2) as world:
            policy = world.config.default_policy
            await world.checker.check(policy, "prompt", f"mail {CANARY}")
            await world.checker.check(policy, "response", f"mail {CANARY}", context=CANARY)
            await world.checker.check(policy, "response", f"{CANARY}\ud800")
            assert CANARY not in generate_latest(world.registry).decode()

    with caplog.at_level(logging.DEBUG):
        try:
            asyncio.run(scenario())
        finally:
            logging.getLogger("google").propagate = False
    assert "has log_sanitize_operations" in caplog.text
    for record in caplog.records:
        assert CANARY not in repr(record.__dict__)
        assert CANARY not in record.getMessage()


def test_a_text_that_is_not_unicode_is_unchecked() -> None:
    async def scenario() -> None:
        async with checking() as world:
            for stage in ("prompt", "response"):
                verdict = await world.checker.check(world.config.default_policy, stage, "x\ud800")
                assert verdict == unchecked("invalid")

    asyncio.run(scenario())


def test_after_the_end_checks_are_unchecked_and_nothing_is_left_running() -> None:
    async def scenario() -> None:
        async with checking() as world:
            await world.checker.check(world.config.default_policy, "prompt", "x")
            await world.checker.close()
            verdict = await world.checker.check(world.config.default_policy, "prompt", "y")
            assert verdict == unchecked("unavailable")
        ours = [task for task in asyncio.all_tasks() if "_keep_fresh" in repr(task)]
        assert ours == []

    asyncio.run(scenario())


def test_without_credentials_there_is_a_problem_that_names_the_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent.json")

    async def scenario() -> None:
        config = ArmorConfig(armor_prompt_template=TEMPLATE)
        checker = ArmorChecker(config, Policies(config), GuardMetrics(CollectorRegistry()))
        try:
            await checker.start()
            assert await checker.check(config.default_policy, "prompt", "x") == unchecked("denied")
            problem = checker.problem() or ""
            assert TEMPLATE in problem
            assert "roles/modelarmor.user" in problem
        finally:
            await checker.close()

    asyncio.run(scenario())


def test_without_the_insecure_option_it_speaks_tls_to_the_location(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so never to a plain-text port, with credentials or without."""
    monkeypatch.setattr("google.auth.default", lambda **_: (AnonymousCredentials(), "p"))

    async def scenario() -> None:
        async with checking(armor_insecure=False) as world:
            verdict = await world.checker.check(world.config.default_policy, "prompt", "x")
            assert verdict == unchecked("unavailable")
            assert (world.fake.texts, world.fake.num_probes) == ([], 0)
        connections = Connections(ArmorConfig(armor_prompt_template=TEMPLATE))
        client = await connections._client(connections.endpoint(TEMPLATE))
        assert client.transport.host == "modelarmor.europe-west4.rep.googleapis.com:443"
        assert client.transport.kind == "grpc_asyncio"
        await connections.close()

    asyncio.run(scenario())


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **rest: Any) -> Any:
        if name.startswith("google.cloud"):
            raise ImportError(name)
        return real(name, *args, **rest)

    monkeypatch.setattr(builtins, "__import__", without)
    config = ArmorConfig(armor_prompt_template=TEMPLATE)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'cabochon\[armor\]'"):
        ArmorChecker(config, Policies(config), GuardMetrics(CollectorRegistry()))
