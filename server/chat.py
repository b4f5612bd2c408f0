"""Messages to prompt text: the checkpoint's chat template in jinja2's sandbox, or Gemma's own turn format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cabochon.server.errors import ApiError
from cabochon.server.protocol import Message

# Gemma's turns, for base models whose files carry no template (google/gemma_pytorch documents them).
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('messages must alternate user, assistant, user, ...: start with user') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class ChatTemplate:
    """Renders messages; special tokens stand in the text, so it is encoded without adding any."""

    def __init__(
        self, source: str, special: dict[str, str], *, system_role: Literal["error", "prepend"]
    ) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        self._template = environment.from_string(source)
        self._special = special
        self._has_system = "system" in source and "System role not supported" not in source
        self._system_role = system_role

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the model answers. Raises ApiError if the template refuses the messages."""
        turns = [{"role": message.role, "content": message.text} for message in messages]
        if not self._has_system:
            turns = self._without_system(turns)
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._special)
        except TemplateError as error:
            raise ApiError(
                f"messages do not fit the model's chat template: {error}", param="messages"
            ) from None

    def _without_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
        if not system:
            return turns
        if self._system_role == "error":
            raise ApiError(
                "messages must have no system or developer role, this model knows none: put the instructions into"
                " the first user message, or start the server with --system-role prepend",
                param="messages",
                code="unsupported_role",
            )
        turns = [turn for turn in turns if turn["role"] not in ("system", "developer")]
        if not turns:
            raise ApiError("messages must have a user message: add one", param="messages")
        first = {**turns[0], "content": "\n\n".join([*system, turns[0]["content"]])}
        return [first, *turns[1:]]


def load_chat_template(
    directory: Path, override: str | None, system_role: Literal["error", "prepend"]
) -> ChatTemplate:
    """From --chat-template, chat_template.jinja, tokenizer_config.json, or Gemma's own, in this order."""
    config = _read_json(directory / "tokenizer_config.json")
    special = {
        name: _token(config.get(name), default)
        for name, default in (("bos_token", "<bos>"), ("eos_token", "<eos>"))
    }
    file = Path(override) if override else directory / "chat_template.jinja"
    source = file.read_text() if override or file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    return ChatTemplate(source or GEMMA_TEMPLATE, special, system_role=system_role)


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text()) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _token(value: Any, default: str) -> str:
    return str(value["content"] if isinstance(value, dict) else value or default)


def _refuse(message: str) -> None:
    raise TemplateError(message)
