"""The two shapes of an answer, chat and completion, whole and in chunks."""

from dataclasses import dataclass
from typing import Any, Literal

from cabochon.engine.detokenizer import TokenBytes
from cabochon.server.generation import Delta
from cabochon.server.logprobs import ScoredTokens, chat_logprobs, completion_logprobs


@dataclass(slots=True)
class Usage:
    """Tokens of a body: prompts once, however many choices."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Format:
    """Frames of one answer."""

    kind: Literal["chat", "completion"]
    answer_id: str
    model: str  # as the client named it
    created: int
    fingerprint: str
    token_bytes: TokenBytes

    def whole(
        self,
        texts: list[str],
        reasons: list[str | None],
        scored: list[ScoredTokens | None],
        usage: Usage,
    ) -> dict[str, Any]:
        """The answer to a body without `stream`."""
        choices = [
            self._choice(index, text, reasons[index], self._logprobs(scored[index], 0))
            for index, text in enumerate(texts)
        ]
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._frame(name), "choices": choices, "usage": usage.as_json()}

    def chunk(
        self, delta: Delta, *, is_first: bool, usage: dict[str, Any], offset: int = 0
    ) -> dict[str, Any]:
        """One event. usage: {} or {"usage": ...}. offset: characters of the tokens of chunks before."""
        logprobs = self._logprobs(delta.scored, offset)
        if self.kind == "completion":
            choice = self._choice(delta.index, delta.text, delta.finish_reason, logprobs)
            return {**self._frame("text_completion"), "choices": [choice], **usage}
        content: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if delta.text or is_first:
            content["content"] = delta.text
        choice = {
            "index": delta.index,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        return {**self._frame("chat.completion.chunk"), "choices": [choice], **usage}

    def last(self, usage: Usage) -> dict[str, Any]:
        """The event with the usage, after all choices."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._frame(name), "choices": [], "usage": usage.as_json()}

    def _choice(
        self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        if self.kind == "completion":
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scored: ScoredTokens | None, offset: int) -> dict[str, Any] | None:
        if scored is None:
            return None
        if self.kind == "chat":
            return chat_logprobs(scored, self.token_bytes)
        return completion_logprobs(scored, self.token_bytes, offset)

    def _frame(self, name: str) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
