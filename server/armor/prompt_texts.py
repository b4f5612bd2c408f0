"""What of a body a client has written: the texts to check, and the body with others in their place.

All turns, whoever they say has spoken: a body without a history that we keep is the client's from end to end.
What an answer must look like is checked too, since the model goes on from what a grammar made it say. What
does not change as a chat goes on stands first, then turn by turn, so that what passed before is a beginning.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cabochon.server.protocol import ChatRequest, CompletionRequest, GenerationRequest, Message, ToolCall
from cabochon.server.tools import arguments_value


class PromptTexts(NamedTuple):
    """Texts of a body in its order, and what makes a body of as many others, None if that cannot be."""

    texts: list[str]
    replaced: Callable[[Sequence[str]], Any]
    param: str  # of the body, which errors name


def chat_texts(body: ChatRequest, param: str = "messages") -> PromptTexts:
    """The form of the answer, tools, then of each message what is said and what was called."""
    texts = [*_form(body), *(tool.function.model_dump_json(exclude_none=True) for tool in body.tools)]
    said: dict[int, int] = {}  # where the text of a message stands
    for index, message in enumerate(body.messages):
        said[len(texts)] = index
        texts.append(message.text)
        for call in message.tool_calls or ():
            texts += _call_texts(call)
        if message.tool_call_id is not None:
            texts.append(message.tool_call_id)

    def replaced(others: Sequence[str]) -> ChatRequest | None:
        messages = list(body.messages)
        for at, (text, other) in enumerate(zip(texts, others, strict=True)):
            if at in said:
                messages[said[at]] = _saying(messages[said[at]], other)
            elif text != other:
                return None  # calls, tools and schemas have a form that a rewrite may break
        return body.model_copy(update={"messages": messages})

    return PromptTexts(texts, replaced, param)


def completion_texts(body: CompletionRequest, text_of: Callable[[str | list[int]], str]) -> PromptTexts:
    """The form of the answer, then of each prompt its text. text_of: a prompt's, which may be token ids."""
    form = list(_form(body))
    prompts: list[Any] = list(body.prompts)
    texts = [text_of(prompt) for prompt in prompts]

    def replaced(others: Sequence[str]) -> CompletionRequest | None:
        if list(others[: len(form)]) != form:
            return None
        kept = zip(prompts, texts, others[len(form) :], strict=True)
        return body.model_copy(
            update={"prompt": [prompt if text == other else other for prompt, text, other in kept]}
        )

    return PromptTexts([*form, *texts], replaced, "prompt")


def _form(body: GenerationRequest) -> Iterator[str]:
    """A regular expression, choices, a schema, a grammar: as a reader sees them, not as JSON escapes them."""
    for field in (body.response_format, body.structured_outputs):
        given = {} if field is None else field.model_dump(by_alias=True, exclude_none=True)
        given.pop("type", None)
        for value in given.values():
            if not isinstance(value, bool):
                yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _call_texts(call: ToolCall) -> list[str]:
    """Templates show arguments as they came, or decoded: an escaped word would be another one."""
    arguments = call.function.arguments
    decoded = json.dumps(arguments_value(arguments), ensure_ascii=False)
    return [f"{call.id} {call.function.name}", arguments, *([decoded] if "\\" in arguments else [])]


def _saying(message: Message, text: str) -> Message:
    if message.text == text:
        return message
    return message.model_copy(update={"content": text, "refusal": None})
