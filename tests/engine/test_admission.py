"""Requests that the model's limits refuse, and every message."""

import pytest
from paged_world import World

from cabochon.engine.admission import check_request
from cabochon.engine.errors import BadPrompt, BadSampling, PromptTooLong, RequestError
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("fields", "params", "error", "message"),
    [
        ({"prompt_ids": []}, {}, BadPrompt, "at least one token, got none"),
        ({"prompt_ids": [3, -1]}, {}, BadPrompt, r"token ids must be in \[0, 50\), the prompt has -1..3"),
        ({"prompt_ids": [50]}, {}, BadPrompt, r"token ids must be in \[0, 50\), the prompt has 50..50"),
        (
            {"prompt_ids": [3] * 48},
            {},
            PromptTooLong,
            "^This model's maximum context length is 48 tokens.*48 tokens",
        ),
        ({"prompt_ids": [3] * 48}, {"max_tokens": 50}, PromptTooLong, "the prompt is too long, shorten it"),
        (
            {"prompt_ids": [3] * 40},
            {"max_tokens": 9},
            PromptTooLong,
            "40 tokens and 9 of output are wanted: the prompt is too long, shorten it or lower max_tokens$",
        ),
        (
            {},
            {"max_tokens": 48},
            PromptTooLong,
            "has 3 tokens and 48 of output are wanted: lower max_tokens$",
        ),
        (
            {},
            {"logit_bias": {50: 1.0}},
            BadSampling,
            r"logit_bias must name token ids in \[0, 50\), got 50..50",
        ),
        ({}, {"stop_token_ids": (-1,)}, BadSampling, r"stop_token_ids must name token ids in \[0, 50\)"),
        ({}, {"min_tokens": 46}, BadSampling, "min_tokens must be at most the 45 tokens"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_and_nothing_is_kept(
    fields: dict[str, object], params: dict[str, object], error: type[RequestError], message: str
) -> None:
    world = World()
    with pytest.raises(error, match=message):
        world.scheduler.add(
            GenerateRequest(
                **{"request_id": "a", "prompt_ids": [3, 4, 5], "params": SamplingParams(**params), **fields}
            )
        )
    assert not world.scheduler.has_work
    world.scheduler.check()


@pytest.mark.parametrize(("length", "max_tokens", "settled"), [(1, None, 47), (47, None, 1), (40, 8, 8)])
def test_what_fits_is_accepted(length: int, max_tokens: int | None, settled: int) -> None:
    message = GenerateRequest(
        request_id="a", prompt_ids=[3] * length, params=SamplingParams(max_tokens=max_tokens)
    )
    assert check_request(message, max_model_len=48, vocab_size=50) == settled


def test_the_errors_name_the_field_at_fault() -> None:
    world = World()
    for length, max_tokens, param in ((48, None, "prompt"), (40, 9, "max_tokens")):
        message = GenerateRequest(
            request_id="a", prompt_ids=[3] * length, params=SamplingParams(max_tokens=max_tokens)
        )
        with pytest.raises(PromptTooLong) as caught:
            world.scheduler.add(message)
        assert caught.value.param == param
