"""Where targets stand, from rows as a GPU check writes them. The figures are invented."""

import pytest
from gpu_targets import TARGETS, Row, standing, table

DECODE = {"phase": "decode 2b", "size": "2b", "context": 1024}
ATTENTION = {"phase": "kernel decode_attention", "is_sliding": False, "provider": "ours"}
LONG = {"phase": "kernel prefill_attention", "seqs": 1, "queries": 8192, "keys": 8192, "is_sliding": False}
ROWS: list[Row] = [
    {**DECODE, "case": "decode 2b S=1 plain", "variant": "plain", "share_of_roofline": 0.4, "tok_per_s": 229},
    {**DECODE, "case": "decode 2b S=1 fast", "variant": "fast", "share_of_roofline": 0.8, "tok_per_s": 458},
    {**DECODE, "case": "decode 2b S=1 fast, fp8 weights", "variant": "fast, fp8 weights", "tok_per_s": 700},
    {
        **DECODE,
        "case": "decode 2b S=256 plain",
        "variant": "plain",
        "share_of_roofline": 0.6,
        "tok_per_s": 9000,
    },
    {"phase": "decode 2b", "status": "ok"},
    {
        "phase": "decode 9b",
        "case": "decode 9b S=128 plain",
        "error": "OutOfMemoryError",
        "message": "no room",
    },
    {"phase": "decode 9b", "status": "failed", "error": "OutOfMemoryError"},
    {"phase": "prefill 9b", "status": "skipped", "message": "no time left"},
    {**ATTENTION, "seqs": 256, "keys": 1024, "share_of_copy": 0.93, "gb_per_s": 2790},
    {**ATTENTION, "seqs": 32, "keys": 8192, "share_of_copy": 0.85, "gb_per_s": 2550},
    {**ATTENTION, "seqs": 32, "keys": 8192, "is_sliding": True, "share_of_copy": 0.99, "gb_per_s": 2970},
    {**LONG, "provider": "ours", "tflop_per_s": 300, "share_of_product": 0.38},
]


def verdicts(rows: list[Row]) -> list[tuple[str, str]]:
    return [standing(target, rows)[2:] for target in TARGETS]


def test_each_target_has_its_value_or_its_reason() -> None:
    assert verdicts([*ROWS, {**LONG, "provider": "fa3", "tflop_per_s": 400}]) == [
        ("80.0%", "reached (458 tok/s, fast)"),
        ("60.0%", "missed (9,000 tok/s, plain)"),
        ("not measured", "OutOfMemoryError: no room"),
        ("not measured", "phase `prefill 9b`: skipped no time left"),
        ("93.0%", "reached (2,790 GB/s)"),
        ("85.0%", "missed (2,550 GB/s)"),
        ("75.0%", "missed (300 TFLOP/s, 38.0% of the bf16 product; fa3-fwd 400)"),
    ]


@pytest.mark.parametrize(
    ("theirs", "why"),
    [({"absent": True}, "absent"), ({"error": "OSError", "message": "no symbol"}, "OSError: no symbol")],
)
def test_without_fa3_the_share_of_the_product_is_told(theirs: Row, why: str) -> None:
    rows = [*ROWS, {**LONG, "provider": "fa3", **theirs}]
    told = f"300 TFLOP/s, 38.0% of the bf16 product; fa3-fwd {why}"
    assert verdicts(rows)[-1] == ("not measured", told)


def test_without_rows_nothing_is_measured_and_every_target_is_listed() -> None:
    lines = table([])
    assert len(lines) == len(TARGETS) == 7
    assert all("not measured" in line and "did not run" in line for line in lines)


def test_the_shares_wanted_are_those_of_the_design() -> None:
    assert [target.least for target in TARGETS] == [0.76, 0.70, 0.76, 0.64, 0.90, 0.90, 0.80]
