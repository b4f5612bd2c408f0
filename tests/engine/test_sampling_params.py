"""Ranges of the sampling parameters: each message, the borders, NaN and infinity, and what the flags mean."""

import dataclasses
import math
import re

import pytest

from cabochon.engine.channel import encode
from cabochon.engine.errors import BadSampling
from cabochon.engine.messages import GenerateRequest, Submit
from cabochon.engine.sampling_params import MAX_LOGIT_BIAS, MAX_SEED, MAX_STOP_TOKENS, SamplingParams

RANGES = {
    "temperature": "in [0, 100]",
    "top_p": "in (0, 1]",
    "min_p": "in [0, 1]",
    "repetition_penalty": "in (0, 100]",
    "presence_penalty": "in [-2, 2]",
    "frequency_penalty": "in [-2, 2]",
}


def refused(fields: dict[str, object], param: str, must_be: str, given: object) -> None:
    message = f"{param} must be {must_be}, got {given}: correct it or leave it out"
    with pytest.raises(BadSampling, match=f"^{re.escape(message)}$") as caught:
        SamplingParams(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("param", "value", "must_be"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -1, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("top_k", -1, "0 (off) or more, below 2^31"),
        ("top_k", 2**31, "0 (off) or more, below 2^31"),
        ("seed", -1, "in [0, 2^63)"),
        ("seed", 2**63, "in [0, 2^63)"),
        ("temperature", -1e-9, RANGES["temperature"]),
        ("temperature", 100.1, RANGES["temperature"]),
        ("top_p", 0.0, RANGES["top_p"]),
        ("top_p", -0.5, RANGES["top_p"]),
        ("top_p", 1.0001, RANGES["top_p"]),
        ("min_p", -1e-9, RANGES["min_p"]),
        ("min_p", 1.1, RANGES["min_p"]),
        ("repetition_penalty", 0.0, RANGES["repetition_penalty"]),
        ("repetition_penalty", -1.0, RANGES["repetition_penalty"]),
        ("repetition_penalty", 101.0, RANGES["repetition_penalty"]),
        ("presence_penalty", -2.01, RANGES["presence_penalty"]),
        ("presence_penalty", 2.01, RANGES["presence_penalty"]),
        ("frequency_penalty", -2.01, RANGES["frequency_penalty"]),
        ("frequency_penalty", 2.01, RANGES["frequency_penalty"]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(param: str, value: float, must_be: str) -> None:
    refused({param: value}, param, must_be, value)


@pytest.mark.parametrize("param", RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_nan_or_infinite(param: str, value: float) -> None:
    refused({param: value}, param, RANGES[param], value)


@pytest.mark.parametrize("bias", [100.1, -100.1, math.nan, math.inf])
def test_one_wrong_bias_among_many_is_refused(bias: float) -> None:
    refused({"logit_bias": {1: 5.0, 2: bias}}, "logit_bias", "made of values in [-100, 100]", bias)


def test_min_tokens_are_at_most_max_tokens() -> None:
    refused({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens = 4", 5)
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=5).max_tokens is None


def test_lists_have_a_limit_that_itself_is_accepted() -> None:
    bias = dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)
    refused({"logit_bias": bias}, "logit_bias", "of at most 1024 tokens", 1025)
    stop = tuple(range(MAX_STOP_TOKENS + 1))
    refused({"stop_token_ids": stop}, "stop_token_ids", "of at most 256 ids", 257)
    del bias[0]
    assert len(SamplingParams(logit_bias=bias, stop_token_ids=stop[1:]).logit_bias) == MAX_LOGIT_BIAS


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1},
        {"min_tokens": 0},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_k": 0},
        {"top_p": 5e-324},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 100.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"logit_bias": {0: 100.0, 1: -100.0}},
    ],
    ids=str,
)
def test_the_borders_are_accepted(fields: dict[str, object]) -> None:
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == fields


def test_the_defaults_leave_the_distribution_alone() -> None:
    given = dataclasses.asdict(SamplingParams())
    ones = dict.fromkeys(("temperature", "top_p", "repetition_penalty"), 1)
    assert {name: value for name, value in given.items() if value} == ones


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0, True), (9e-6, True), (1e-5, False), (1, False)])
def test_a_temperature_below_what_fp32_can_divide_by_is_greedy(temperature: float, is_greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy is is_greedy


@pytest.mark.parametrize(
    ("fields", "has_penalties"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": {1: 1.0}, "temperature": 0, "min_p": 0.1}, False),
    ],
    ids=str,
)
def test_penalties_are_those_that_need_the_history(fields: dict[str, object], has_penalties: bool) -> None:
    assert SamplingParams(**fields).has_penalties is has_penalties


def test_two_requests_do_not_share_their_bias() -> None:
    assert SamplingParams().logit_bias is not SamplingParams().logit_bias


def test_a_changed_copy_is_validated_as_well() -> None:
    with pytest.raises(BadSampling, match="top_p must be in"):
        dataclasses.replace(SamplingParams(), top_p=2.0)


def test_what_is_accepted_can_be_sent_to_the_engine() -> None:
    try:
        params = SamplingParams(top_k=2**64)
    except BadSampling:
        return
    encode(Submit(request=GenerateRequest(request_id="a", prompt_ids=[3], params=params)))
