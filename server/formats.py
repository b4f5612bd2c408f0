"""Answers on the wire, whole or in events: chat and completion. Each is told of every delta, in order."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from cabochon.engine.detokenizer import TokenBytes
from cabochon.server.errors import ApiError
from cabochon.server.generation import Delta
from cabochon.server.logprobs import ScoredTokens, chat_logprobs, completion_logprobs, text_length
from cabochon.server.streaming import DONE, event
from cabochon.server.tool_calls import Arguments, CallParser, CallStart, Part, Text
from cabochon.server.tools import ToolUse


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every piece of an answer repeats, and what a stream says beside the text."""

    answer_id: str
    model: str  # as the client named it
    created: int  # s since the epoch
    fingerprint: str
    token_bytes: TokenBytes
    usage: Usage  # counted elsewhere, before the answer hears of the delta
    include_usage: bool = False  # a last chunk with it
    continuous_usage: bool = False  # on every chunk

    def frame(self, kind: str) -> dict[str, Any]:
        """The fields around choices."""
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def end(self, kind: str) -> list[bytes]:
        """The last events of a stream of chunks of that kind."""
        if not self.include_usage:
            return [DONE]
        return [event({**self.frame(kind), "choices": [], "usage": self.usage.as_json()}), DONE]

    def chunk_usage(self) -> dict[str, Any]:
        """What a chunk says of it, as fields."""
        if self.continuous_usage:
            return {"usage": self.usage.as_json()}
        return {"usage": None} if self.include_usage else {}


class Answer(ABC):
    """One answer. Either add() each delta and then whole(), or opening(), events() of each, closing().

    A choice that content_filter ends has no text, call or log probability of its own in whole().
    """

    @abstractmethod
    def add(self, delta: Delta) -> None:
        """Take a delta for whole()."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The answer to a body without `stream`."""

    def opening(self) -> list[bytes]:
        """Events before the first delta."""
        return []

    @abstractmethod
    def events(self, delta: Delta) -> list[bytes]:
        """Events of a delta; none while text is held back: a stop string, a call, or half a character."""

    @abstractmethod
    def closing(self) -> list[bytes]:
        """Events after the last delta."""

    def failure(self, error: ApiError) -> list[bytes]:
        """Events instead of closing(): the status is sent, the error can only be one."""
        return [event(error.body())]


@dataclass(slots=True)
class _Call:
    name: str
    call_id: str = field(default_factory=lambda: f"call_{uuid4().hex[:24]}")
    arguments: str = ""

    def as_json(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(slots=True)
class _ChatChoice:
    parser: CallParser | None
    text: str = ""
    calls: list[_Call] = field(default_factory=list)
    scored: ScoredTokens | None = None
    finish_reason: str | None = None
    has_started: bool = False


def parts_of(delta: Delta, parser: CallParser | None) -> Sequence[Part]:
    """The delta's text as text and calls. parser: of the answer, if it may have calls."""
    if delta.finish_reason == "content_filter":
        return []  # what the parser holds is dropped
    if parser is None:
        return [Text(delta.text)] if delta.text else []
    return parser.feed(delta.text) + (parser.flush() if delta.finish_reason else [])


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    def __init__(self, head: Head, num_choices: int, tools: ToolUse | None) -> None:
        self._head = head
        self._tools = tools
        names = None if tools is None else tools.names
        self._choices = [
            _ChatChoice(None if names is None else CallParser(names)) for _ in range(num_choices)
        ]

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.index]
        text, _ = self._take(choice, delta)
        if delta.finish_reason == "content_filter":
            choice.text, choice.scored = "", None
            choice.calls.clear()
            return
        choice.text += text
        if delta.scored is not None:
            choice.scored = choice.scored or ScoredTokens()
            choice.scored.extend(delta.scored.token_ids, delta.scored.logprobs)

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self._choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message["content"] = choice.text or None
                message["tool_calls"] = [call.as_json() for call in choice.calls]
            logprobs = self._logprobs(choice.scored)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": choice.finish_reason,
                }
            )
        return {
            **self._head.frame("chat.completion"),
            "choices": choices,
            "usage": self._head.usage.as_json(),
        }

    def events(self, delta: Delta) -> list[bytes]:
        choice = self._choices[delta.index]
        text, calls = self._take(choice, delta)
        if not (text or calls or delta.scored or delta.finish_reason) and choice.has_started:
            return []
        content: dict[str, Any] = {}
        if not choice.has_started:
            content = {"role": "assistant", "content": None if self._tools is not None else ""}
            choice.has_started = True
        if text:
            content["content"] = text
        if calls:
            content["tool_calls"] = calls
        chunk = {
            "index": delta.index,
            "delta": content,
            "logprobs": self._logprobs(delta.scored),
            "finish_reason": choice.finish_reason,
        }
        head = self._head
        return [event({**head.frame("chat.completion.chunk"), "choices": [chunk], **head.chunk_usage()})]

    def closing(self) -> list[bytes]:
        return self._head.end("chat.completion.chunk")

    def _take(self, choice: _ChatChoice, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        """Enter it. Returns the new text and the new pieces of calls, as a chunk has them."""
        text, pieces = "", []
        for part in parts_of(delta, choice.parser):
            match part:
                case Text(more):
                    text += more
                case CallStart(name):
                    call = _Call(name)
                    choice.calls.append(call)
                    pieces.append({"index": len(choice.calls) - 1, **call.as_json()})
                case Arguments(more):
                    index = len(choice.calls) - 1
                    choice.calls[index].arguments += more
                    if not pieces or pieces[-1]["index"] != index:
                        pieces.append({"index": index, "function": {"arguments": ""}})
                    pieces[-1]["function"]["arguments"] += more
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            if self._tools is not None:
                is_whole = choice.parser is not None and not choice.parser.is_open
                has_called = bool(choice.calls) and is_whole
                choice.finish_reason = self._tools.finish_reason(delta.finish_reason, has_called=has_called)
        return text, pieces

    def _logprobs(self, scored: ScoredTokens | None) -> dict[str, Any] | None:
        return None if scored is None else chat_logprobs(scored, self._head.token_bytes)


class CompletionAnswer(Answer):
    """Of /v1/completions. echo: per choice, the text before the generated one."""

    def __init__(self, head: Head, echo: list[str]) -> None:
        self._head = head
        self._echo = echo
        self._texts = list(echo)
        self._scored: list[ScoredTokens | None] = [None] * len(echo)
        self._reasons: list[str | None] = [None] * len(echo)
        self._offsets: dict[int, int] = {}  # of choices that were seen: characters of the tokens so far

    def add(self, delta: Delta) -> None:
        index = delta.index
        self._reasons[index] = delta.finish_reason
        if delta.finish_reason == "content_filter":
            self._texts[index], self._scored[index] = self._echo[index], None
            return
        self._texts[index] += delta.text
        if delta.scored is not None:
            self._scored[index] = so_far = self._scored[index] or ScoredTokens()
            so_far.extend(delta.scored.token_ids, delta.scored.logprobs)

    def whole(self) -> dict[str, Any]:
        choices = [
            _choice(index, text, self._logprobs(self._scored[index], 0), self._reasons[index])
            for index, text in enumerate(self._texts)
        ]
        return {
            **self._head.frame("text_completion"),
            "choices": choices,
            "usage": self._head.usage.as_json(),
        }

    def events(self, delta: Delta) -> list[bytes]:
        is_first = delta.index not in self._offsets
        if not (delta.text or delta.finish_reason or is_first or delta.scored):
            return []
        offset = self._offsets.setdefault(delta.index, 0)
        if delta.scored is not None:
            self._offsets[delta.index] += text_length(delta.scored, self._head.token_bytes)
        text = self._echo[delta.index] + delta.text if is_first else delta.text
        choice = _choice(delta.index, text, self._logprobs(delta.scored, offset), delta.finish_reason)
        head = self._head
        return [event({**head.frame("text_completion"), "choices": [choice], **head.chunk_usage()})]

    def closing(self) -> list[bytes]:
        return self._head.end("text_completion")

    def _logprobs(self, scored: ScoredTokens | None, offset: int) -> dict[str, Any] | None:
        return None if scored is None else completion_logprobs(scored, self._head.token_bytes, offset)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
