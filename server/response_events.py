"""The answer of /v1/responses: a Response object, or the events by which it grows."""

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from cabochon.server.errors import ApiError
from cabochon.server.formats import Answer, Head, parts_of
from cabochon.server.generation import Delta
from cabochon.server.logprobs import ScoredTokens, chat_logprobs
from cabochon.server.responses import ResponsesRequest
from cabochon.server.streaming import encode_json
from cabochon.server.tool_calls import Arguments, CallParser, CallStart, Text
from cabochon.server.tools import ToolUse


@dataclass(slots=True)
class _Item:
    """A message, or a call if it has a name. content: the text, or the arguments."""

    name: str | None = None
    content: str = ""
    item_id: str = field(default_factory=lambda: uuid4().hex)
    status: str = "in_progress"
    logprobs: list[Any] = field(default_factory=list)

    @property
    def wire_id(self) -> str:
        return f"msg_{self.item_id}" if self.name is None else f"fc_{self.item_id}"

    def as_json(self) -> dict[str, Any]:
        if self.name is not None:
            return {
                "id": self.wire_id,
                "type": "function_call",
                "status": self.status,
                "call_id": f"call_{self.item_id[:24]}",
                "name": self.name,
                "arguments": self.content,
            }
        is_empty = self.status == "in_progress" and not self.content
        return {
            "id": self.wire_id,
            "type": "message",
            "status": self.status,
            "role": "assistant",
            "content": [] if is_empty else [self.part()],
        }

    def part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": self.content,
            "annotations": [],
            "logprobs": self.logprobs,
        }


class ResponseAnswer(Answer):
    """One response. Its items are opened by what arrives: text a message, a call a call."""

    def __init__(self, head: Head, body: ResponsesRequest, tools: ToolUse | None) -> None:
        self._head = head
        self._body = body
        self._parser = CallParser(tools.names) if tools is not None else None
        self._items: list[_Item] = []
        self._finish_reason: str | None = None
        self._error: ApiError | None = None
        self._num_events = 0
        self._scored: list[Any] = []  # log probabilities that no message has taken yet

    def add(self, delta: Delta) -> None:
        self.events(delta)

    def whole(self) -> dict[str, Any]:
        self._end()
        return self._response()

    def opening(self) -> list[bytes]:
        return [
            self._event(f"response.{name}", response=self._response()) for name in ("created", "in_progress")
        ]

    def events(self, delta: Delta) -> list[bytes]:
        self._finish_reason = delta.finish_reason
        if delta.scored is not None:
            self._scored += _logprobs(self._head, delta.scored)
        events = []
        if delta.finish_reason == "content_filter":
            self._scored = []
            if not self._body.stream:
                self._items.clear()
        for part in parts_of(delta, self._parser):
            match part:
                case Text(text):
                    if not self._items or self._items[-1].name is not None:
                        events += self._open(_Item())
                    events.append(self._text(text))
                case CallStart(name):
                    events += self._open(_Item(name))
                case Arguments(text):
                    self._items[-1].content += text
                    events.append(self._of_item("response.function_call_arguments.delta", delta=text))
        return events

    def closing(self) -> list[bytes]:
        events = self._end()
        name = "response.completed" if self._status() == "completed" else "response.incomplete"
        return [*events, self._event(name, response=self._response())]

    def failure(self, error: ApiError) -> list[bytes]:
        self._error = error
        return [self._event("response.failed", response=self._response())]

    def _text(self, text: str) -> bytes:
        item = self._items[-1]
        item.content += text
        item.logprobs += self._scored
        logprobs, self._scored = self._scored, []
        return self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _open(self, item: _Item) -> list[bytes]:
        events = self._close()
        self._items.append(item)
        index = len(self._items) - 1
        events.append(self._event("response.output_item.added", output_index=index, item=item.as_json()))
        if item.name is None:
            events.append(self._of_item("response.content_part.added", content_index=0, part=item.part()))
        return events

    def _close(self, status: str = "completed") -> list[bytes]:
        if not self._items or self._items[-1].status != "in_progress":
            return []
        item = self._items[-1]
        item.status = status
        if item.name is None:
            item.logprobs += self._scored
            done = [
                self._of_item(
                    "response.output_text.done", content_index=0, text=item.content, logprobs=item.logprobs
                ),
                self._of_item("response.content_part.done", content_index=0, part=item.part()),
            ]
        else:
            done = [
                self._of_item("response.function_call_arguments.done", name=item.name, arguments=item.content)
            ]
        self._scored = []
        index = len(self._items) - 1
        return [*done, self._event("response.output_item.done", output_index=index, item=item.as_json())]

    def _end(self) -> list[bytes]:
        """Close the last item; an answer without any has an empty message."""
        events = [] if self._items else self._open(_Item())
        is_cut = self._parser is not None and self._parser.is_open  # by a stop string
        return events + self._close("incomplete" if is_cut else self._status())

    def _status(self) -> str:
        if self._error is not None:
            return "failed"
        if self._finish_reason is None:
            return "in_progress"
        return "completed" if self._finish_reason == "stop" else "incomplete"

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self._body.stream:
            return b""  # a whole answer grows by the same steps, and nobody reads them
        content = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode_json(content))

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._items[-1].wire_id, "output_index": len(self._items) - 1}
        return self._event(kind, **place, **fields)

    def _response(self) -> dict[str, Any]:
        body, status, usage = self._body, self._status(), self._head.usage
        reason = "content_filter" if self._finish_reason == "content_filter" else "max_output_tokens"
        choice = body.tool_choice or "auto"
        return {
            "id": self._head.answer_id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "error": self._error and {"code": "server_error", "message": str(self._error)},
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._head.model,
            "output": [item.as_json() for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True) or {"format": {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": "disabled",
            "metadata": body.metadata,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
            if status in ("completed", "incomplete")
            else None,
        }


def _logprobs(head: Head, scored: ScoredTokens) -> list[Any]:
    entries: list[Any] = chat_logprobs(scored, head.token_bytes)["content"]
    return entries
