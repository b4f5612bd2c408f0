"""Each rule for /metrics is broken once, in a text that is right otherwise."""

import pytest
from fake_server import fake_service
from picker_metrics import FULL, LORA

from cabochon.server.gateway.finding import Finding, Result
from cabochon.server.gateway.http_client import Answer
from cabochon.server.gateway.metrics_checks import judge_metrics

TEXT = "text/plain; version=0.0.4; charset=utf-8"
ONE_LORA = "".join(line + "\n" for line in LORA.splitlines() if '="old"' not in line and '"9"' not in line)
ALL_CHECKS = [
    "metrics.answer",
    "metrics.type",
    "metrics.format",
    "metrics.gauges",
    "metrics.series",
    "metrics.values",
    "picker.reads",
    "metrics.lora",
]


def judged(text: str, status: int = 200, kind: str = TEXT) -> list[Finding]:
    return judge_metrics(Answer(status, {"content-type": kind}, [text.encode()]))


def broken(findings: list[Finding]) -> dict[str, Result]:
    """Those that did not pass."""
    return {finding.check: finding.result for finding in findings if finding.result is not Result.PASS}


def test_a_text_with_everything_passes() -> None:
    findings = judged(FULL + ONE_LORA)
    assert [finding.check for finding in findings] == ALL_CHECKS
    assert broken(findings) == {}
    assert all(finding.advice == "" for finding in findings)


def test_a_server_without_adapters_passes_and_says_so() -> None:
    assert broken(judged(FULL)) == {"metrics.lora": Result.SKIP}


def test_our_own_text_passes() -> None:
    service = fake_service()
    assert broken(judged(service.metrics.render().decode())) == {"metrics.lora": Result.SKIP}


@pytest.mark.parametrize(
    ("check", "old", "new", "measured"),
    [
        ("metrics.format", "# TYPE vllm:num_requests_waiting gauge\n", "größe 1\n", "line 1 is neither"),
        ("metrics.gauges", "# TYPE vllm:num_requests_running gauge\n", "", "running is untyped"),
        ("metrics.series", "} 3.0\n", "} 3.0\nvllm:num_requests_waiting 4\n", "2 of waiting"),
        ("metrics.values", "} 0.25", "} 25", "kv_cache_usage_perc 25"),
        ("metrics.values", "} 0.25", "} NaN", "kv_cache_usage_perc nan"),
        ("metrics.values", "} 3.0", "} -1", "waiting -1"),
        ("metrics.values", "} 7.0", "} 6.5", "running 6.5"),
        ("picker.reads", "num_requests_running", "num_running", "running must be there, it is not"),
        ("picker.reads", 'block_size="16"', 'block_size="auto"', "block_size must be an integer"),
        ("picker.reads", 'num_gpu_blocks="4096"', 'num_gpu_blocks="0"', "above 0, it has not"),
        ("metrics.lora", "1.796e9", "1", "the value is no time"),
        ("metrics.lora", 'max_lora="4"', 'max_lora="many"', "max_lora is no integer"),
        ("metrics.lora", "} 1.796e9\n", "} 1.796e9\nvllm:lora_requests_info{} 1\n", "2 series"),
    ],
)
def test_each_rule_can_fail(check: str, old: str, new: str, measured: str) -> None:
    good = FULL + ONE_LORA
    assert old in good
    findings = judged(good.replace(old, new))
    failed = {finding.check: finding for finding in findings if finding.result is Result.FAIL}
    assert check in failed
    assert set(failed) <= {check, "picker.reads"}, "a label that is wrong is also one that cannot be read"
    assert measured in failed[check].measured
    assert failed[check].advice


def test_only_the_status_is_judged_if_it_is_not_200() -> None:
    findings = judged(FULL, status=401)
    assert broken(findings) == {"metrics.answer": Result.FAIL}
    assert len(findings) == 2


def test_another_content_type_is_a_warning() -> None:
    assert broken(judged(FULL + ONE_LORA, kind="application/openmetrics-text")) == {
        "metrics.type": Result.WARN
    }


def test_bytes_that_are_no_utf8_fail() -> None:
    findings = judge_metrics(Answer(200, {"content-type": TEXT}, [b"\xff"]))
    assert broken(findings) == {"metrics.format": Result.FAIL}
