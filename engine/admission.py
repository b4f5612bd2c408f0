"""Checks a request against the model's limits before anything is kept of it."""

from cabochon.engine.errors import BadPrompt, BadSampling, PromptTooLong
from cabochon.engine.messages import GenerateRequest


def check_request(request: GenerateRequest, *, max_model_len: int, vocab_size: int) -> int:
    """Returns the output tokens it may have at most. Raises BadPrompt, PromptTooLong or BadSampling."""
    ids, params = request.prompt_ids, request.params
    if not ids:
        raise BadPrompt("a prompt must have at least one token, got none: send text or token ids", "prompt")
    # Millions of ids are too many anyhow, whatever they are
    if len(ids) <= max_model_len and (min(ids) < 0 or max(ids) >= vocab_size):
        raise BadPrompt(
            f"token ids must be in [0, {vocab_size}), the prompt has {min(ids)}..{max(ids)}:"
            " use this model's tokenizer",
            "prompt",
        )
    room = max_model_len - len(ids)
    wanted = room if params.max_tokens is None else params.max_tokens
    if room < max(wanted, 1):
        output = "at least 1" if params.max_tokens is None else str(params.max_tokens)
        remedy = "the prompt is too long, shorten it or lower max_tokens"  # LangChain looks for these words
        if room > 0 and wanted >= max_model_len:
            remedy = "lower max_tokens"  # no prompt would be short enough
        raise PromptTooLong(
            f"This model's maximum context length is {max_model_len} tokens. The prompt has {len(ids)} tokens"
            f" and {output} of output {'are' if wanted > 1 else 'is'} wanted: {remedy}",
            "prompt" if room < 1 else "max_tokens",
        )
    for name, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise BadSampling(
                f"{name} must name token ids in [0, {vocab_size}), got {min(token_ids)}..{max(token_ids)}:"
                " use this model's tokenizer",
                name,
            )
    if params.min_tokens > wanted:
        raise BadSampling(
            f"min_tokens must be at most the {wanted} tokens of output that fit, got {params.min_tokens}:"
            " lower it",
            "min_tokens",
        )
    return wanted
