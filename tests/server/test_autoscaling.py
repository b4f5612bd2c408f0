"""The policy on recorded traces, beside the one that Ray Serve comes with, and in Serve's own hands."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import arrival_traces
import pytest
from fake_server import LiveServer, fake_service
from hypothesis import given, settings
from hypothesis import strategies as st
from replica_pool import REPORT_S, TICK_S, Decide, ReplicaPool, Run
from tools import need_package

from cabochon.engine.errors import ConfigError
from cabochon.server import autoscaling
from cabochon.server.autoscaling import (
    Goals,
    Memory,
    Policy,
    Pool,
    ReplicaLoad,
    autoscaling_stats,
    desired_replicas,
    policy,
)

GOALS = Goals()
IDLE = ReplicaLoad(
    queued_tokens=0,
    predicted_wait_s=0,
    arrived_tokens_per_s=0,
    prefill_tokens_per_s=1000,
    kv_usage=0,
    running=0,
    waiting=0,
    max_running=64,
    ttft_s=0,
)
SERVES_TUNED = 16.0  # requests in a replica of replica_pool at 0.8 of its rate, with prompts of 1000 tokens


def play(name: str, *, start: int, hot_share: float = 0.0) -> Run:
    pool = ReplicaPool(policy, start=start)
    pool.hot_share = hot_share
    return pool.play(arrival_traces.read(name))


def settle(loads: list[ReplicaLoad | None], target: int, seconds: int, memory: Memory | None = None) -> int:
    """What the pool comes to if the loads stay as they are. Bounds are 1 and 12."""
    for now in range(seconds):
        target, memory = desired_replicas(loads, Pool(target, 1, 12), memory, float(now), GOALS)
    return target


@pytest.mark.parametrize("name", arrival_traces.SHAPES)
def test_the_traces_are_those_that_their_program_makes(name: str) -> None:
    assert arrival_traces.read(name) == arrival_traces.make(name)


def test_in_a_ramp_replicas_are_ready_before_anybody_waits_too_long() -> None:
    run = play("ramp", start=3)
    assert max(run.worst_wait_s) < GOALS.slo_s
    assert run.late_share(GOALS.slo_s) == 0
    assert run.direction_changes == 0
    assert max(run.targets) <= 14  # 32 requests a second are eight replicas, 10 at `high`, 13.3 at `low`


def test_without_the_trend_of_the_demand_a_ramp_is_seen_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaling, "_growth", lambda points: 0.0)
    assert play("ramp", start=3).late_share(GOALS.slo_s) > 0.03


def test_longer_prompts_scale_though_requests_stay_as_many() -> None:
    run = play("long_prompts", start=2)
    assert run.targets[-1] >= 7  # five replicas' worth at 0.8
    assert run.late_share(GOALS.slo_s) < 0.01


def test_a_burst_reaches_what_it_needs_within_three_reports() -> None:
    run = play("burst", start=2)
    begin, seven = round(300 / TICK_S), next(i for i, target in enumerate(run.targets) if target >= 7)
    assert run.targets[begin] == 2
    assert seven - begin <= 3 * REPORT_S / TICK_S  # 20 requests a second: five replicas, 6.25 at `high`


def test_after_a_burst_and_a_quiet_time_the_pool_is_small_again() -> None:
    run = play("burst", start=2)
    assert run.targets[-1] == 2
    assert run.direction_changes == 1
    end = round(600 / TICK_S)
    assert min(run.targets[end : end + round(GOALS.quiet_s / 2 / TICK_S)]) == max(run.targets)


def test_a_day_has_one_turn() -> None:
    run = play("diurnal", start=2)
    assert run.direction_changes == 1
    assert run.targets[-1] == 2
    assert run.late_share(GOALS.slo_s) < 0.001
    assert run.replica_hours < 0.8 * max(run.targets) * len(run.targets) * TICK_S / 3600


def test_noise_around_a_threshold_does_not_make_the_pool_flap() -> None:
    run = play("noise", start=3)
    assert run.direction_changes == 0
    assert set(run.targets) <= {3, 4, 5}


def test_one_hot_replica_is_no_reason_to_grow() -> None:
    run = play("steady", start=4, hot_share=0.6)
    assert max(run.worst_wait_s) > 100  # it is far beyond its rate, and new replicas would not relieve it
    assert max(run.targets) == max(play("steady", start=4).targets)


def test_a_silent_replica_neither_adds_demand_nor_lets_the_pool_shrink() -> None:
    pool = ReplicaPool(policy, start=6)

    def silence(pool: ReplicaPool) -> None:
        pool.replicas[0].is_silent = True

    pool.on_tick = silence
    assert set(pool.play(arrival_traces.read("steady")).targets) == {6}
    assert ReplicaPool(policy, start=6).play(arrival_traces.read("steady")).targets[-1] < 6


def serves_own(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Decide, Callable[..., Any]]:
    """Serve's policy as its controller runs it, and contexts for it; it reads its time from them."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own, while it is imported
        need_package("ray.serve")
        from ray.serve._private.autoscaling_state import _resolve_policy_callable
        from ray.serve.autoscaling_policy import _apply_autoscaling_config
        from ray.serve.config import AutoscalingConfig, AutoscalingContext

    config = AutoscalingConfig(min_replicas=1, max_replicas=16, **options)
    decide = _apply_autoscaling_config(_resolve_policy_callable(config.policy))
    unused = dict.fromkeys(("app_name", "last_scale_up_time", "last_scale_down_time"))
    names = {"deployment_id": "d", "deployment_name": "d", "total_queued_requests": 0}

    now = [0.0]
    monkeypatch.setattr("ray.serve.autoscaling_policy.time", SimpleNamespace(time=lambda: now[0]))

    def make(**fields: Any) -> Any:
        now[0] = fields["current_time"]
        return AutoscalingContext(**unused, **names, **fields, aggregated_metrics={}, config=config)

    return decide, make


def test_where_prompts_grow_serves_own_policy_counts_the_wrong_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned for the first prompts, and with our delays. While lengths stay it does as well."""
    options = {"target_ongoing_requests": SERVES_TUNED, "upscale_delay_s": 0, "downscale_delay_s": 300}
    decide, make = serves_own(monkeypatch, **options)
    theirs = ReplicaPool(decide, start=2, make_context=make).play(arrival_traces.read("long_prompts"))
    ours = play("long_prompts", start=2)
    assert ours.late_share(GOALS.slo_s) < 0.01 < 0.2 < theirs.late_share(GOALS.slo_s)
    assert ours.direction_changes == 0 < theirs.direction_changes
    assert ours.replica_hours < theirs.replica_hours


def test_serve_runs_the_policy_by_its_name_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {"policy_function": "cabochon.server.autoscaling:policy"}
    decide, make = serves_own(monkeypatch, policy=by_name, upscale_delay_s=0, downscale_delay_s=0)
    trace = arrival_traces.read("burst")
    assert (
        ReplicaPool(decide, start=2, make_context=make).play(trace).targets == play("burst", start=2).targets
    )


def test_serve_hands_goals_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"policy_function": "cabochon.server.autoscaling:Policy", "policy_kwargs": {"quiet_s": 60}}
    decide, make = serves_own(monkeypatch, policy=kwargs, upscale_delay_s=0, downscale_delay_s=0)
    trace = arrival_traces.read("burst")
    run = ReplicaPool(decide, start=2, make_context=make).play(trace)
    assert run.targets == ReplicaPool(Policy(quiet_s=60), start=2).play(trace).targets
    assert run.replica_hours < play("burst", start=2).replica_hours


def test_rows_kv_memory_and_prompt_tokens_each_grow_the_pool() -> None:
    for busy in (
        replace(IDLE, running=60),
        replace(IDLE, kv_usage=0.9),
        replace(IDLE, arrived_tokens_per_s=900),
        replace(IDLE, queued_tokens=120_000),
    ):
        assert desired_replicas([busy, busy], Pool(2, 1, 12), None, 0.0, GOALS)[0] == 3
        assert desired_replicas([IDLE, IDLE], Pool(2, 1, 12), None, 0.0, GOALS)[0] == 2


def test_late_first_tokens_grow_the_pool_where_the_prediction_was_wrong() -> None:
    late = replace(IDLE, ttft_s=3.0, waiting=1)
    assert settle([late] * 2, 2, 30) == 3  # one more than is ready, not one more each time
    assert settle([replace(late, waiting=0)] * 2, 2, 30) == 2  # long prompts: nobody waits for anybody
    assert settle([late, IDLE, IDLE], 3, 30) == 3


def test_a_queue_does_not_ask_again_for_replicas_that_are_loading() -> None:
    behind = replace(IDLE, queued_tokens=240_000, predicted_wait_s=240)
    first = desired_replicas([behind], Pool(1, 1, 12), None, 0.0, GOALS)[0]
    assert first == 3
    assert settle([behind], first, 100) == first


def test_shrinking_leaves_room_for_all_that_runs() -> None:
    assert settle([replace(IDLE, running=16)] * 4, 4, 400) == 2  # 64 rows of 64 · 0.6
    assert settle([replace(IDLE, kv_usage=0.3)] * 4, 4, 400) == 2
    assert settle([IDLE] * 4, 4, 299) == 4
    assert settle([IDLE] * 4, 4, 400) == 1


def test_without_any_report_the_pool_stays_as_it_is() -> None:
    assert settle([None, None], 2, 1000) == 2
    assert settle([], 5, 1000) == 5


def test_after_a_break_a_whole_quiet_time_must_pass_again() -> None:
    target, memory = 4, None
    for now in (*range(250), *range(400, 690)):
        target, memory = desired_replicas([IDLE] * 4, Pool(target, 1, 12), memory, float(now), GOALS)
    assert target == 4


def test_the_rate_of_busy_times_is_remembered_in_easy_ones() -> None:
    busy = replace(IDLE, prefill_tokens_per_s=4000, arrived_tokens_per_s=3000)
    easy = replace(IDLE, prefill_tokens_per_s=500, arrived_tokens_per_s=450)  # steps with little in them
    _, memory = desired_replicas([busy], Pool(1, 1, 12), None, 0.0, GOALS)
    assert desired_replicas([easy], Pool(1, 1, 12), memory, 1.0, GOALS)[0] == 1
    assert desired_replicas([easy], Pool(1, 1, 12), None, 1.0, GOALS)[0] == 2
    late = replace(easy, predicted_wait_s=1.5)  # and is not believed when it proves wrong
    assert desired_replicas([late], Pool(1, 1, 12), memory, 1.0, GOALS)[0] == 2


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1.0])
def test_reports_that_are_stale_incomplete_or_not_finite_are_none(broken: float) -> None:
    names = list(autoscaling_stats(fake_service()))

    def decide(**changes: Any) -> int:
        values = {**dict.fromkeys(names, 0.0), "max_running": 64.0, "kv_usage": 0.9, **changes}
        time_s = values.pop("time_s", 1000.0)
        context = SimpleNamespace(
            running_replicas=["a"],
            target_num_replicas=1,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=4,
            policy_state={},
            current_time=1000.0,
            raw_metrics={
                name: {"a": [SimpleNamespace(timestamp=time_s, value=value)]}
                for name, value in values.items()
                if value is not None
            },
        )
        return policy(context)[0]

    assert decide() == 2
    assert decide(time_s=1000.0 - GOALS.stale_s - 1) == 1
    assert decide(running=None) == 1
    assert decide(queued_tokens=broken) == 1
    assert decide(max_running=0.0) == 1


LOADS = st.builds(
    ReplicaLoad,
    queued_tokens=st.floats(0, 1e6),
    predicted_wait_s=st.floats(0, 100),
    arrived_tokens_per_s=st.floats(0, 1e5),
    prefill_tokens_per_s=st.floats(0, 1e4),
    kv_usage=st.floats(0, 1),
    running=st.integers(0, 64),
    waiting=st.integers(0, 1000),
    max_running=st.just(64.0),
    ttft_s=st.floats(0, 100),
)
GROWING = ("queued_tokens", "predicted_wait_s", "arrived_tokens_per_s", "kv_usage", "running", "ttft_s")


@given(
    st.lists(st.lists(LOADS | st.none(), max_size=5), min_size=1, max_size=20),
    st.integers(0, 5),
    st.integers(1, 8),
    st.floats(0.1, 60),
    st.lists(st.sampled_from(GROWING), min_size=1),
    st.floats(1, 4),
)
@settings(deadline=None)
def test_the_result_is_within_bounds_and_more_load_never_gives_less(
    rounds: list[list[ReplicaLoad | None]],
    least: int,
    span: int,
    step_s: float,
    names: list[str],
    factor: float,
) -> None:
    target, memory, now = least, None, 0.0
    for loads in rounds:
        pool, now = Pool(target, least, least + span), now + step_s
        before = memory
        target, memory = desired_replicas(loads, pool, before, now, GOALS)
        assert max(1, least) <= target <= least + span
        more = [load and replace(load, **{n: getattr(load, n) * factor for n in names}) for load in loads]
        assert desired_replicas(more, pool, before, now, GOALS)[0] >= target
        assert len(memory.trend) <= 14
        assert len(memory.peaks) <= 12


def test_goals_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="slo_s must be a positive number, got 0: raise it"):
        Goals(slo_s=0)
    with pytest.raises(ConfigError, match=r"0 < low < high ≤ 1, got 0\.9 and 0\.8: leave a gap"):
        Goals(low=0.9)


def test_a_replica_reports_what_its_engine_and_its_requests_say(live: LiveServer) -> None:
    live.engine.snapshot = replace(
        live.engine.snapshot, queued_tokens=900, prefill_tokens_per_s=300.0, pages_used=256, waiting=3
    )
    live.complete([5] * 40, max_tokens=2, n=2, ignore_eos=True)
    stats = autoscaling_stats(live.service)
    assert set(stats) == {field for field in ReplicaLoad.__slots__}
    assert all(type(value) is float for value in stats.values())
    assert stats["queued_tokens"] == 900
    assert stats["predicted_wait_s"] == 3
    assert stats["kv_usage"] == 0.25
    assert stats["waiting"] == 3
    assert stats["max_running"] == live.engine.info.max_seqs
    assert 0 < stats["ttft_s"] < 5
    assert 80 / 31 < stats["arrived_tokens_per_s"] <= 80 / 5


def test_requests_that_are_turned_away_count_as_demand(live: LiveServer) -> None:
    live.engine.snapshot = replace(live.engine.snapshot, queued_tokens=10_000, prefill_tokens_per_s=100.0)
    assert live.complete([5] * 50).status_code == 429
    assert autoscaling_stats(live.service)["arrived_tokens_per_s"] > 0
