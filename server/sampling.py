"""The sampling of a choice, from the fields of a body."""

from cabochon.engine.sampling_params import Grammar, SamplingParams
from cabochon.server.errors import ApiError
from cabochon.server.protocol import GenerationRequest


def sampling_params(
    body: GenerationRequest, max_tokens: int | None, seed: int, grammar: Grammar | None
) -> SamplingParams:
    """max_tokens: of the answer, 0 for an echo alone; seed: of this choice. Raises ApiError."""
    try:
        bias = {int(token_id): value for token_id, value in body.logit_bias.items()}
    except ValueError:
        raise ApiError("logit_bias must have token ids as keys: correct it", param="logit_bias") from None
    return SamplingParams(
        max_tokens=1 if max_tokens == 0 else max_tokens,  # an echo alone: the token is not shown
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        seed=seed,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        grammar=grammar,
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
    )
