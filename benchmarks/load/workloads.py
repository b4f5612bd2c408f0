"""What is asked: bodies of requests, drawn from a seed. When they are sent is `arrivals`' matter.

Prompts are random token ids, so that lengths are exact and nothing is found in a prefix cache by chance;
Texts are words, for chats and for servers that take no ids: about a token each, the server's count is what
is reported.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Rng = np.random.Generator
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# ShareGPT-like lengths. Means: figure 11 of the PagedAttention paper (arXiv:2309.06180). Shapes: ServeGen
# (arXiv:2505.09999) finds exponential outputs and heavy-tailed prompts in production; SIGMA is our choice.
SHAREGPT_PROMPT_MEAN, SHAREGPT_OUTPUT_MEAN = 161.31, 337.99
SIGMA = 1.0
LONGEST = 2048  # of either; 0.1 % of prompts and 0.2 % of outputs are cut there

WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "they", "at",
    "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were", "when", "we",
    "there", "can", "an", "your", "which", "their", "said", "if", "do", "will", "each", "about", "how", "up",
    "out", "them", "then", "she", "many", "some", "so", "these", "would", "other", "into", "has", "more",
    "her", "two", "like", "him", "see", "time",
)  # fmt: skip
STONE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "colour": {"enum": ["red", "green", "blue", "white"]},
        "carats": {"type": "number", "minimum": 0, "maximum": 100},
        "cuts": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["name", "colour", "carats", "cuts"],
    "additionalProperties": False,
}
STONES = {"type": "array", "items": STONE, "minItems": 1000}  # longer than an answer may be


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, ready to send. kind: what its figures are grouped by."""

    path: str
    body: dict[str, Any]
    kind: str = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Makes bodies for one server."""

    model: str
    has_ids: bool = True  # prompts of completions are token ids, else words
    top_id: int = 200_000  # ids are below it: every Gemma has 256,000 and more
    ignores_eos: bool = True  # vLLM's option, so that each answer has the length asked for

    def completion(self, rng: Rng, prompt_tokens: int, output_tokens: int, kind: str = "all") -> Ask:
        """A prompt that was never seen before."""
        prompt = self.ids(rng, prompt_tokens) if self.has_ids else words(rng, prompt_tokens)
        return Ask(COMPLETIONS, {"prompt": prompt, **self._common(output_tokens)}, kind)

    def chat(self, system: str, user: str, output_tokens: int, **fields: Any) -> Ask:
        """A conversation's first turn. Gemma's template has no system role: what is shared goes first."""
        text = f"{system}\n\n{user}" if system else user
        return Ask(
            CHAT,
            {"messages": [{"role": "user", "content": text}], **self._common(output_tokens), **fields},
        )

    def ids(self, rng: Rng, count: int) -> list[int]:
        """Above the control tokens, which stand at the beginning of a vocabulary."""
        return list(map(int, rng.integers(min(1000, self.top_id // 2), self.top_id, count)))

    def _common(self, output_tokens: int) -> dict[str, Any]:
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return {**common, "ignore_eos": True} if self.ignores_eos else common


Draw = Callable[[Rng], Ask]  # the next request of a workload


def fixed(asker: Asker, prompt_tokens: int, output_tokens: int, kind: str = "all") -> Draw:
    """All of one size."""
    return lambda rng: asker.completion(rng, prompt_tokens, output_tokens, kind)


def sharegpt(asker: Asker, scale: float = 1.0) -> Draw:
    """Sizes as of people's chats; `scale` shortens all for a slow machine."""

    def draw(rng: Rng) -> Ask:
        prompt_tokens, output_tokens = sharegpt_lengths(rng)
        return asker.completion(
            rng, max(1, round(prompt_tokens * scale)), max(1, round(output_tokens * scale))
        )

    return draw


def sharegpt_lengths(rng: Rng) -> tuple[int, int]:
    """Tokens of a prompt and of its answer."""
    prompt = rng.lognormal(np.log(SHAREGPT_PROMPT_MEAN) - SIGMA**2 / 2, SIGMA)
    output = rng.exponential(SHAREGPT_OUTPUT_MEAN)
    return min(LONGEST, max(4, round(prompt))), min(LONGEST, max(1, round(output)))


def shared_prefix(
    asker: Asker, prefixes: int, prefix_tokens: int, turn_tokens: int, output_tokens: int
) -> Draw:
    """Chats that begin with one of a few long instructions, as an application's do. Equal for every seed."""
    shared = [words(np.random.default_rng(index), prefix_tokens) for index in range(prefixes)]

    def draw(rng: Rng) -> Ask:
        return asker.chat(shared[rng.integers(prefixes)], words(rng, turn_tokens), output_tokens)

    return draw


def schema(asker: Asker, prompt_tokens: int, output_tokens: int) -> Draw:
    """An answer that follows a schema to its end, which is its limit of tokens."""
    wanted = {"type": "json_schema", "json_schema": {"name": "stones", "schema": STONES}}
    return lambda rng: asker.chat("", words(rng, prompt_tokens), output_tokens, response_format=wanted)


def words(rng: Rng, count: int) -> str:
    """Common English words: about a token each in any vocabulary."""
    return " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=count))


def encode(ask: Ask) -> bytes:
    """Its body in JSON; made before the clock runs."""
    return json.dumps(ask.body).encode()
