"""Extraction by the rules of the picker: which series counts, what is missing, what stays."""

from dataclasses import replace

import pytest
from fake_server import fake_service
from picker_metrics import FULL, LORA

from cabochon.server.gateway.endpoint_metrics import EndpointMetrics, extract
from cabochon.server.gateway.exposition import parse

NOTHING = EndpointMetrics()
READ = EndpointMetrics(waiting=3, running=7, kv_usage=0.25, page_tokens=16, num_pages=4096, updated_s=5.0)


def read(text: str, before: EndpointMetrics = NOTHING) -> EndpointMetrics:
    metrics, errors = extract(parse(text), before, now_s=5.0)
    assert errors == []
    return metrics


def test_every_field_is_read_from_its_family() -> None:
    assert read(FULL) == READ


def test_the_server_has_every_family_that_the_picker_asks_for() -> None:
    metrics = read(fake_service().metrics.render().decode())
    assert metrics.page_tokens > 0
    assert metrics.num_pages > 0


def test_of_several_series_the_first_one_counts() -> None:
    more = FULL.replace(
        "# TYPE vllm:num_requests_running", "vllm:num_requests_waiting 9\n# TYPE vllm:num_requests_running"
    )
    assert read(more).waiting == 3


def test_of_several_series_with_times_the_latest_counts() -> None:
    more = FULL.replace(
        "} 3.0", "} 3.0 1000\nvllm:num_requests_waiting 9 1001\nvllm:num_requests_waiting 4 999"
    )
    assert read(more).waiting == 9


def test_a_sample_without_type_reads_as_zero() -> None:
    assert read(FULL.replace("# TYPE vllm:num_requests_waiting gauge\n", "")) == replace(READ, waiting=0)


@pytest.mark.parametrize("kind", ["histogram", "summary", "untyped"])
def test_only_gauges_and_counters_have_a_value(kind: str) -> None:
    assert read(FULL.replace("perc gauge", f"perc {kind}")).kv_usage == 0
    assert read(FULL.replace("perc gauge", "perc counter")).kv_usage == 0.25


def test_a_missing_family_is_an_error_but_the_rest_is_fresh() -> None:
    before = EndpointMetrics(waiting=8, updated_s=1.0)
    metrics, errors = extract(parse(FULL.replace("num_requests_waiting", "requests_waiting")), before, 5.0)
    assert metrics == replace(READ, waiting=8)
    assert errors == ["metric family vllm:num_requests_waiting must be there, it is not"]


def test_a_text_without_any_known_family_refreshes_nothing() -> None:
    metrics, errors = extract(parse("# TYPE up gauge\nup 1\n"), READ, 9.0)
    assert metrics == READ
    assert len(errors) == 4


def test_sizes_that_are_no_integers_are_errors() -> None:
    text = FULL.replace('"16"', '"16.0"').replace('"4096"', '"many"')
    metrics, errors = extract(parse(text), READ, 6.0)
    assert metrics == replace(READ, page_tokens=0, updated_s=6.0)
    assert [error.split()[1] for error in errors] == ["block_size", "num_gpu_blocks"]


def test_no_lora_family_is_no_error_and_changes_nothing() -> None:
    before = EndpointMetrics(active_adapters=frozenset({"red"}), max_adapters=2)
    assert read(FULL, before) == replace(READ, active_adapters=frozenset({"red"}), max_adapters=2)


def test_the_lora_series_with_the_largest_value_wins_wherever_it_stands() -> None:
    expected = replace(
        READ,
        active_adapters=frozenset({"red", "blue"}),
        waiting_adapters=frozenset({"green"}),
        max_adapters=4,
    )
    assert read(FULL + LORA) == expected
    head, *series = LORA.splitlines()
    assert read("\n".join([FULL + head, *reversed(series), ""])) == expected


def test_lora_series_without_type_all_read_as_zero_so_that_the_first_wins() -> None:
    metrics = read(FULL + LORA.partition("\n")[2])
    assert metrics.active_adapters == {"old"}


def test_an_adapter_that_left_is_forgotten_with_the_next_series() -> None:
    later = FULL + LORA.replace('"9"', '""').replace("1.79e9", "1.8e9")
    metrics = read(later, read(FULL + LORA))
    assert (metrics.active_adapters, metrics.waiting_adapters) == (frozenset(), frozenset())
    assert metrics.max_adapters == 4  # an empty one says nothing
