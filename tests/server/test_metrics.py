"""/metrics as an endpoint picker parses it: vLLM's names, typed, one series per gauge."""

import socket
import time
from dataclasses import replace

import pytest
from fake_server import COMPLETIONS, LiveServer, fake_service, request_bytes, wait_until
from prometheus_client.parser import text_string_to_metric_families

from cabochon.engine.errors import ComputeError
from cabochon.engine.fake import FAKE_INFO, FakeEngine
from cabochon.engine.messages import EngineStats

GAUGES = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
COUNTERS = ["vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prefix_cache_queries",
            "vllm:prefix_cache_hits",
            "vllm:num_preemptions", "vllm:request_success"]  # fmt: skip
HISTOGRAMS = [
    "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds", "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds", "vllm:iteration_tokens_total",
]  # fmt: skip


def scrape(live: LiveServer) -> dict[str, float]:
    """Samples by name and labels but model_name."""
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sample.labels.items() if k != "model_name")
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in samples, "one series each"
            samples[name] = sample.value
    return samples


def test_families_have_vllms_names_and_types(shared: LiveServer) -> None:
    families = {f.name: f.type for f in text_string_to_metric_families(shared.http.get("/metrics").text)}
    expected = {
        **dict.fromkeys([*GAUGES, "vllm:cache_config_info"], "gauge"),
        **dict.fromkeys(COUNTERS, "counter"),
        **dict.fromkeys(HISTOGRAMS, "histogram"),
    }
    assert families == expected


def test_nothing_is_created_twice(shared: LiveServer) -> None:
    text = shared.http.get("/metrics").text
    assert "_created" not in text
    assert text.isascii()


def test_gauges_are_those_of_the_last_snapshot(live: LiveServer) -> None:
    live.engine.snapshot = EngineStats(
        waiting=3, pages_total=100, pages_used=25, pages_cached=50, prompt_tokens=7, prefix_queries=6,
        prefix_hits=5, preemptions=2, generation_tokens=11,
    )  # fmt: skip
    samples = scrape(live)
    assert samples["vllm:num_requests_waiting"] == 3
    assert samples["vllm:num_requests_running"] == 0
    assert samples["vllm:kv_cache_usage_perc"] == 0.25, "cached pages count as free"
    assert samples["vllm:prompt_tokens_total"] == 7
    assert samples["vllm:generation_tokens_total"] == 11
    assert samples["vllm:prefix_cache_queries_total"] == 6
    assert samples["vllm:prefix_cache_hits_total"] == 5
    assert samples["vllm:num_preemptions_total"] == 2


def test_every_series_names_the_model() -> None:
    with LiveServer(served_model_name=("gemma", "other")) as live:
        for family in text_string_to_metric_families(live.http.get("/metrics").text):
            assert all(sample.labels["model_name"] == "gemma" for sample in family.samples)


def test_cache_config_multiplies_to_tokens(shared: LiveServer) -> None:
    (family,) = [
        f
        for f in text_string_to_metric_families(shared.http.get("/metrics").text)
        if "cache_config" in f.name
    ]
    labels = family.samples[0].labels
    assert family.samples[0].value == 1
    tokens = int(labels["block_size"]) * int(labels["num_gpu_blocks"])
    assert tokens == shared.engine.info.kv_capacity_tokens


def lora_info(live: LiveServer) -> tuple[dict[str, str], float]:
    """Labels and value of the one series."""
    text = live.http.get("/metrics").text
    (family,) = [f for f in text_string_to_metric_families(text) if f.name == "vllm:lora_requests_info"]
    (sample,) = family.samples
    assert family.type == "gauge"
    return sample.labels, sample.value


def test_adapters_are_in_slots_or_waited_for_and_the_value_is_the_time() -> None:
    with LiveServer(engine=FakeEngine(replace(FAKE_INFO, max_loras=3))) as live:
        before_s = time.time()
        labels, value = lora_info(live)
        assert labels == {"max_lora": "3", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        assert before_s <= value <= time.time()
        live.engine.snapshot = replace(
            live.engine.snapshot, resident_adapters=["b", "org/a", "b"], waiting_adapters=["c", "b", "d", "c"]
        )
        labels, later = lora_info(live)
        assert later > value
        assert labels == {
            "max_lora": "3",
            "running_lora_adapters": "b,org/a",
            "waiting_lora_adapters": "c,d",  # b, in both, would take two of the picker's three places
        }


def test_any_adapters_name_comes_back_from_the_metric() -> None:
    names = ["a b", 'quo"te', "back\\slash", "{x}=1", "é 宝石"]
    with LiveServer(engine=FakeEngine(replace(FAKE_INFO, max_loras=3))) as live:
        live.engine.snapshot = replace(live.engine.snapshot, resident_adapters=names)
        assert lora_info(live)[0]["running_lora_adapters"].split(",") == names


def test_a_finished_request_is_observed_once_everywhere(live: LiveServer) -> None:
    live.complete([300], max_tokens=4)
    samples = scrape(live)
    assert samples["vllm:request_success_total{finished_reason=length}"] == 1
    for name in HISTOGRAMS:
        count = {"vllm:inter_token_latency_seconds": 3, "vllm:iteration_tokens_total": 4}.get(name, 1)
        assert samples[f"{name}_count"] == count, name
        assert samples[f"{name}_sum"] >= 0


def test_first_token_and_token_gaps_are_measured_in_seconds(live: LiveServer) -> None:
    live.faults.delay_s = 0.05
    live.complete([300], max_tokens=3)
    samples = scrape(live)
    assert 0.05 <= samples["vllm:time_to_first_token_seconds_sum"] < 0.1
    assert 0.1 <= samples["vllm:inter_token_latency_seconds_sum"] < 0.2
    assert 0.15 <= samples["vllm:e2e_request_latency_seconds_sum"] < 0.3


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error"])
def test_every_end_has_a_reason_from_the_start(shared: LiveServer, reason: str) -> None:
    assert f"vllm:request_success_total{{finished_reason={reason}}}" in scrape(shared)


def test_errors_and_aborts_are_counted(live: LiveServer) -> None:
    live.faults.fails_after_tokens = {2: ComputeError("logits must be finite")}
    live.complete([300], max_tokens=4)
    live.faults.fails_after_tokens = {}
    live.faults.is_paused = True
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall(request_bytes(COMPLETIONS, {"prompt": [300], "n": 2}))
        wait_until(lambda: len(live.engine.open) == 2)
    wait_until(lambda: len(live.engine.aborted) == 2)
    samples = scrape(live)
    assert samples["vllm:request_success_total{finished_reason=error}"] == 1
    assert samples["vllm:request_success_total{finished_reason=abort}"] == 2
    assert samples["vllm:e2e_request_latency_seconds_count"] == 0


def test_a_stop_string_counts_as_stop_and_not_as_abort(live: LiveServer) -> None:
    live.complete("hello", stop="hell", max_tokens=9)
    samples = scrape(live)
    assert samples["vllm:request_success_total{finished_reason=stop}"] == 1
    assert samples["vllm:request_success_total{finished_reason=abort}"] == 0


def test_two_services_in_a_process_do_not_meet() -> None:
    first, second = fake_service(), fake_service()
    first.metrics.count_end("stop")
    assert b'finished_reason="stop",model_name="fake"} 0.0' in second.metrics.render()


def test_rendering_takes_little_time() -> None:
    service = fake_service()
    service.engine.snapshot = replace(service.engine.snapshot, pages_used=5)  # type: ignore[attr-defined]
    service.metrics.render()
    best_s = 1.0
    for _ in range(20):
        started_s = time.thread_time()
        service.metrics.render()
        best_s = min(best_s, time.thread_time() - started_s)
    assert best_s < 0.003  # the target is 1 ms; a loaded machine may be slower


def test_a_dead_engine_has_no_metrics(live: LiveServer) -> None:
    """Its last gauges would look idle to a picker, which would send it every request."""
    assert live.http.get("/metrics").status_code == 200
    live.engine.die()
    answer = live.http.get("/metrics")
    assert answer.status_code == 503
    assert not list(text_string_to_metric_families(answer.text))
