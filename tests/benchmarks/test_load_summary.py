"""The arithmetic of a load test against cases computed by hand."""

import pytest
from load.client import Record
from load.drive import Run
from load.server_side import Queued, parse_queue, queue_figures
from load.summary import Slo, latencies, median_of, parse_slo, summarize


def record(scheduled_s: float, *event_s: float, sent_s: float | None = None, **fields: object) -> Record:
    one = Record("all", scheduled_s, sent_s=scheduled_s if sent_s is None else sent_s)
    one.event_s = list(event_s)
    one.end_s = event_s[-1] if event_s else scheduled_s
    one.output_tokens = len(event_s)
    for name, value in fields.items():
        setattr(one, name, value)
    return one


def test_latencies_of_a_case_by_hand() -> None:
    row = latencies([record(0, 1, 2, 4), record(10, 13, 14, 15)])
    assert (row["ttft_p50_ms"], row["ttft_p90_ms"]) == (2000, 2800)  # 1 and 3 s
    assert row["itl_p50_ms"] == 1000  # gaps of 1, 2, 1, 1 s
    assert row["itl_p99_ms"] == 1970
    assert row["tpot_p50_ms"] == 1250  # (4 - 1) / 2 and (15 - 13) / 2 s
    assert row["e2e_p50_ms"] == 4500  # 4 and 5 s
    curve = row["ttft_curve_ms"]
    assert isinstance(curve, list)
    assert (curve[0], curve[-1]) == ([0, 1000], [100, 3000])


def test_rates_count_what_falls_into_the_window() -> None:
    records = [
        record(0, 9, 11),  # warm-up: its second token comes in the window
        record(10, 12, 14, 16, 18, prompt_tokens=30, cached_tokens=15),
        record(19, 25, 26, prompt_tokens=10),  # due in the window, answered after it
        record(20, 21),  # due after it
    ]
    row = summarize(records, (10, 20), Slo())
    assert (row["requests"], row["completed"], row["failed"]) == (2, 2, 0)
    assert row["output_tok_per_s"] == 0.5  # 1 + 4 in 10 s
    assert row["offered_req_per_s"] == 0.2
    assert row["completed_req_per_s"] == 0.2  # the warm-up's last token came at 11
    assert row["cached_share"] == 0.375  # 15 of 40
    assert row["output_tokens_mean"] == 3


def test_tokens_are_the_servers_count_when_events_carry_several() -> None:
    row = summarize([record(0, 1, 2, output_tokens=8)], (0, 10), Slo())
    assert row["output_tok_per_s"] == 0.8
    assert row["tpot_p50_ms"] == pytest.approx(1000 / 7, rel=1e-3)


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    records = [
        record(0, 0.4, 0.5, 0.6),
        record(1, 1.6, 1.7, 1.8),  # first token late
        record(2, 2.4, 2.8, 3.2),  # tokens far apart
        record(3, 3.1, error="http 429"),
    ]
    row = summarize(records, (0, 10), parse_slo("ttft=500ms,itl=150ms"), price_per_hour=3.6)
    assert row["goodput_req_per_s"] == 0.1
    assert row["slo_met"] == 0.25
    assert row["errors"] == {"http 429": 1}
    assert row["usd_per_million_good_output_tokens"] == pytest.approx(3333, rel=1e-3)  # 0.001 $/s ÷ 0.3 tok/s
    assert row["usd_per_million_output_tokens"] == 1000  # 10 tokens in 10 s


@pytest.mark.parametrize(
    ("text", "slo"),
    [("ttft=500ms,itl=50ms,e2e=10s", Slo(0.5, 0.05, 10.0)), ("e2e=2s", Slo(None, None, 2.0))],
)
def test_an_slo_is_read_with_its_units(text: str, slo: Slo) -> None:
    assert parse_slo(text) == pytest.approx(slo)


@pytest.mark.parametrize("text", ["ttft=500", "ttft=fast", "ttft", "tpot=5ms", ""])
def test_an_slo_without_unit_or_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"an SLO must be .* correct it"):
        parse_slo(text)


def test_an_slo_on_the_gap_does_not_bind_an_answer_of_one_token() -> None:
    assert Slo(itl=0.001).is_met(record(0, 5))
    assert not Slo(ttft=1.0).is_met(record(0, 5))


def test_a_stall_shows_in_latencies_from_the_schedule_and_hides_in_those_from_sending() -> None:
    """A server that answers one at a time in 0.1 s stalls for 5 s; a request a second was due.

    Whoever waits for a free connection and starts its clock then sees one slow request of six.
    """
    due, free_s = range(6), 0.0
    records = []
    for at_s in due:
        sent_s = max(free_s, at_s)
        free_s = sent_s + (5.0 if at_s == 0 else 0.1)
        records.append(record(at_s, free_s, sent_s=sent_s))
    row = latencies(records)
    assert row["ttft_from_send_p50_ms"] == 100
    assert row["ttft_p50_ms"] == 2750  # 5, 4.1, 3.2, 2.3, 1.4 and 0.5 s


def test_the_median_over_rounds_keeps_the_spread_of_every_figure() -> None:
    rows = [{"round": n, "ttft_p50_ms": ms, "errors": {}, "by_kind": {"short": {"ttft_p99_ms": 2 * ms}}}
            for n, ms in enumerate((30.0, 10.0, 20.0))]  # fmt: skip
    found = median_of(rows)
    assert found["ttft_p50_ms"] == 20
    assert found["spread"]["ttft_p50_ms"] == [10, 30]  # type: ignore[index]
    assert found["by_kind"]["short"]["spread"] == {"ttft_p99_ms": [20, 60]}  # type: ignore[index]


METRICS = """# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{{le="0.3",model_name="m"}} {low}
vllm:request_queue_time_seconds_bucket{{le="0.5",model_name="m"}} {middle}
vllm:request_queue_time_seconds_bucket{{le="+Inf",model_name="m"}} {count}
vllm:request_queue_time_seconds_count{{model_name="m"}} {count}
vllm:request_queue_time_seconds_sum{{model_name="m"}} {sum}
"""


def test_queue_time_is_what_came_between_two_scrapes() -> None:
    before = parse_queue(METRICS.format(low=5, middle=5, count=5, sum=0.5))
    after = parse_queue(METRICS.format(low=13, middle=15, count=15, sum=2.5))
    assert before == Queued(0.5, {0.3: 5, 0.5: 5, float("inf"): 5})
    assert queue_figures(before, after) == {
        "queue_mean_ms": 200, "queue_p50_below_ms": 300, "queue_p90_below_ms": 500, "queue_p99_below_ms": 500,
    }  # fmt: skip


def test_a_server_without_the_histogram_has_no_queue_time() -> None:
    assert parse_queue("up 1\n") is None
    assert queue_figures(None, Queued(1.0, {float("inf"): 1})) == {}


def test_a_busy_or_late_client_says_so() -> None:
    quiet, late = record(0, 1, sent_s=0.001), record(0, 1, sent_s=0.5)
    assert not Run(0, (0, 1), [quiet] * 50, [0.001] * 50, 0.2).warnings()
    assert "69% of a core" in Run(0, (0, 1), [quiet], [0.001], 0.69).warnings()[0]
    assert "woke 50 ms late" in Run(0, (0, 1), [quiet], [0.05], 0.1).warnings()[0]
    assert "sent 500 ms late" in Run(0, (0, 1), [late], [0.001], 0.1).warnings()[0]
    assert not Run(0, (0, 1), [late], [0.001], 0.1).warnings(is_bounded=True)
