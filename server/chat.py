"""Messages to prompt text: the checkpoint's chat template in jinja2's sandbox, or Gemma's own turn format.

What a user writes stays text: a control token spelled out in a message ("<end_of_turn>") is cut in two, so
that it is encoded as the characters it is made of. Nobody ends a turn, or speaks as the model, by typing.
(transformers and vLLM read it as the control token; who wants that sends a whole prompt to /v1/completions.)
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cabochon.engine.errors import BadCheckpoint, ConfigError
from cabochon.server.control_strings import ControlStrings
from cabochon.server.errors import ApiError
from cabochon.server.protocol import Message
from cabochon.server.tools import Function, arguments_value, calls_text, declaration, described, output_text

# Gemma's turns, for base models whose files carry no template (google/gemma_pytorch documents them).
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user, assistant, user, ...: merge neighbours') }}"
    "{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CUT = "\ud800"  # marks where a spelled-out control token is cut: half a character, which JSON cannot bring

Turn = dict[str, Any]


class ChatTemplate:
    """Renders messages; special tokens stand in the text, so it is encoded without adding any."""

    def __init__(
        self,
        source: str,
        special: dict[str, str],
        *,
        system_role: Literal["error", "prepend"] = "error",
        control_strings: Sequence[str] = (),
    ) -> None:
        """control_strings: what special tokens look like. Raises ConfigError if the source is no template."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            variables = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ConfigError(f"a chat template must be valid Jinja: {error}: correct it") from None
        self._special = special
        self._prepends = system_role == "prepend"
        self._control = ControlStrings(control_strings)
        self._knows_tools = "tools" in variables

    def render(
        self,
        messages: Sequence[Message],
        *,
        functions: Sequence[Function] = (),
        is_parallel: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[str]:
        """The prompt up to where the model answers, in pieces to be encoded one by one.

        functions: that the model may call; is_parallel: several at once.
        Raises ApiError if the template refuses the messages.
        """
        tools: list[Turn] | None = None
        if self._knows_tools:
            turns = [_native(message) for message in messages]
            tools = [{"type": "function", "function": described(one)} for one in functions] or None
        else:
            turns = _gemma_turns(messages, functions, is_parallel)
        turns, tools = self._cut(turns), self._cut(tools)
        if self._prepends:
            turns = _prepended(turns)
        try:
            text = self._render(turns, tools, add_generation_prompt)
        except Exception as error:  # a template is a program that came with the checkpoint: it may raise any
            self._refuse(turns, tools, error)
        return [piece for piece in text.split(CUT) if piece]

    def _cut(self, value: Any) -> Any:
        """The same with the control strings of every text cut in two."""
        if isinstance(value, str):
            return self._control.cut(value, CUT)
        if isinstance(value, dict):
            return {self._cut(name): self._cut(item) for name, item in value.items()}
        return [self._cut(item) for item in value] if isinstance(value, list) else value

    def _render(self, turns: list[Turn], tools: list[Turn] | None, add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=turns, add_generation_prompt=add_generation_prompt, tools=tools, **self._special
        )

    def _refuse(self, turns: list[Turn], tools: list[Turn] | None, error: Exception) -> NoReturn:
        """Say what is wrong, and what to do where the system role is at fault: it would work without."""
        if any(turn["role"] == "system" for turn in turns):
            try:
                self._render(_prepended(turns), tools, True)
            except Exception:  # as above
                pass
            else:
                raise ApiError(
                    "messages must have no system or developer role, this model knows none: put the text"
                    " into the first user message, or start the server with --system-role prepend",
                    param="messages",
                    code="unsupported_role",
                ) from None
        # Only what the template itself says is shown: messages of other exceptions may quote the prompt
        reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
        raise ApiError(f"messages must fit the model's chat template: {reason}", param="messages") from None


def load_chat_template(
    directory: Path,
    override: str | None = None,
    system_role: Literal["error", "prepend"] = "error",
    control_strings: Sequence[str] = (),
) -> ChatTemplate:
    """From --chat-template, chat_template.jinja, tokenizer_config.json, or Gemma's own, in this order.

    Raises ConfigError or BadCheckpoint.
    """
    config = _read_json(directory / "tokenizer_config.json")
    special = {
        name: _token(config.get(name), default)
        for name, default in (("bos_token", "<bos>"), ("eos_token", "<eos>"))
    }
    file = directory / "chat_template.jinja"
    source: Any = config.get("chat_template")
    if override:
        source = _read_override(override)
    elif file.is_file():
        source = file.read_text(encoding="utf-8")
    if isinstance(source, list):  # several named templates
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    return ChatTemplate(
        source or GEMMA_TEMPLATE, special, system_role=system_role, control_strings=control_strings
    )


class _Generation(Extension):
    """{% generation %}, by which trainers mark the assistant's text: here it is just its text."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Called by jinja at the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers compiles chat templates. Sandboxed, for they come with checkpoints."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise BadCheckpoint(f"{path} must be JSON: {error}: download it again") from None
    return content if isinstance(content, dict) else {}


def _read_override(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template must name a Jinja file, {path} cannot be read: {error}") from None


def _token(value: Any, default: str) -> str:
    return str(value["content"] if isinstance(value, dict) else value or default)


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _native(message: Message) -> Turn:
    """As templates that know tools expect it."""
    turn: Turn = {"role": _role(message), "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": arguments_value(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _gemma_turns(messages: Sequence[Message], functions: Sequence[Function], is_parallel: bool) -> list[Turn]:
    """Tools as text: declared before the first user text, results in user turns (see tools.py)."""
    turns: list[Turn] = []
    follows_tool = False
    for message in messages:
        role, text = _role(message), message.text
        if message.tool_calls:
            calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
            text = "\n".join(filter(None, [text, calls_text(calls)]))
        elif role == "tool":
            role, text = "user", output_text(text)
        if follows_tool and role == "user":
            turns[-1]["content"] += f"\n{text}"
        else:
            turns.append({"role": role, "content": text})
        follows_tool = message.role == "tool" or (follows_tool and role == "user")
    if functions:
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
        if first == len(turns):
            turns.append({"role": "user", "content": ""})
        text = declaration(functions, is_parallel=is_parallel)
        turns[first]["content"] = f"{text}\n{turns[first]['content']}"
    return turns


def _prepended(turns: list[Turn]) -> list[Turn]:
    """System text moves to the front of the first user turn, as Gemma 3's template does it."""
    system = [turn["content"].strip() for turn in turns if turn["role"] == "system"]
    rest = [turn for turn in turns if turn["role"] != "system"]
    if not system or not rest or rest[0]["role"] != "user":
        return turns
    first = {"role": "user", "content": "\n\n".join([*system, rest[0]["content"].strip()])}
    return [first, *rest[1:]]


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
