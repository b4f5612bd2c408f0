"""Log probabilities in the two shapes of OpenAI's answers: chat's objects, completions' parallel lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cabochon.engine.detokenizer import TokenBytes
from cabochon.engine.messages import TokenLogprobs


@dataclass(slots=True)
class ScoredTokens:
    """Tokens and what the model thought of them; None for one that had nothing before it."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """Add tokens behind these."""
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)


def chat_logprobs(scored: ScoredTokens, token_bytes: TokenBytes) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}, ...]}"""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes.of(token_id)
        return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}

    content = [
        {
            **entry(token_id, one.logprob),
            "top_logprobs": [entry(*top) for top in zip(one.top_ids, one.top_logprobs, strict=True)],
        }
        for token_id, one in zip(scored.token_ids, scored.logprobs, strict=True)
        if one is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(scored: ScoredTokens, token_bytes: TokenBytes, offset: int) -> dict[str, Any]:
    """{tokens, token_logprobs, top_logprobs, text_offset}. offset: where the first token stands."""
    tokens = [_text(token_bytes.of(token_id)) for token_id in scored.token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if one is None else one.logprob for one in scored.logprobs],
        "top_logprobs": [_by_text(one, token_bytes) for one in scored.logprobs],
        "text_offset": offsets,
    }


def text_length(scored: ScoredTokens, token_bytes: TokenBytes) -> int:
    """Characters of the tokens as they are shown."""
    return sum(len(_text(token_bytes.of(token_id))) for token_id in scored.token_ids)


def _by_text(one: TokenLogprobs | None, token_bytes: TokenBytes) -> dict[str, float] | None:
    """Of tokens with the same text (a byte and a letter, say) the likelier one stays."""
    if one is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in zip(one.top_ids, one.top_logprobs, strict=True):
        found.setdefault(_text(token_bytes.of(token_id)), logprob)
    return found


def _text(raw: bytes) -> str:
    """A token that is a part of a character is shown as OpenAI shows it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
