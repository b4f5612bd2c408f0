"""OpenAI bodies as the endpoint picker reads them: by the end of the path, with a `model`, prompts as bytes.

Source: llm-d-router, pkg/epp/framework/plugins/requesthandling/parsers/openai and approximateprefix/hashing.
"""

import json
from typing import Any

from cabochon.server.gateway.scheduling import Request

CHAT, COMPLETIONS, RESPONSES = "/chat/completions", "/completions", "/responses"
RENDER = "/render"


class BadBody(ValueError):
    """The client gets 400."""


def read_request(path: str, body: bytes) -> Request:
    """Model and prompts of a body. Raises BadBody as the picker's parser does."""
    try:
        fields = json.loads(body)
    except ValueError:
        raise BadBody("the body must be JSON, it is not: send an object") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), str):
        raise BadBody("the body must be an object with a string `model`, it has none: name a model")
    salt = fields.get("cache_salt")
    return Request(
        model=fields["model"],
        prompts=_prompts(path.partition("?")[0].removesuffix(RENDER), fields),
        salt=salt if isinstance(salt, str) else "",
    )


def read_usage(text: bytes) -> dict[str, Any] | None:
    """Usage of a whole answer, or of the event that has it in one piece of a stream."""
    for line in text.split(b"\n"):
        data = line.removeprefix(b"data: ").strip()
        if b'"usage"' in data:
            try:
                usage = json.loads(data).get("usage")
            except ValueError:
                continue  # cut by a border of the network's pieces
            if usage:
                return dict(usage)
    return None


def _prompts(path: str, fields: dict[str, Any]) -> tuple[bytes, ...]:
    if path.endswith(CHAT):
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadBody("a chat must have at least one message, it has none: send one")
        return (b"".join(_message(message) for message in messages if isinstance(message, dict)),)
    if path.endswith(COMPLETIONS):
        prompt = fields.get("prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return tuple(_text(one) for one in prompt)
        return (_text(prompt),)
    if path.endswith(RESPONSES):
        kept = [{name: fields[name]} for name in ("instructions", "tools", "input") if name in fields]
        return (json.dumps(kept).encode(),)
    return ()


def _message(message: dict[str, Any]) -> bytes:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in (message.get("role"), *texts) if isinstance(text, str)).encode()


def _text(prompt: object) -> bytes:
    """A text, or token ids of four bytes each."""
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    if isinstance(prompt, list) and all(isinstance(one, int) and 0 <= one < 2**32 for one in prompt):
        return b"".join(one.to_bytes(4, "little") for one in prompt)
    return b""
