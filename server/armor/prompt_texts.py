"""What of a body a client has written: the texts to check, and the body with others in their place.

All turns, whoever they say has spoken: a body without a history that we keep is the client's from end to end.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cabochon.server.protocol import ChatRequest, CompletionRequest, Message


class PromptTexts(NamedTuple):
    """Texts of a body in its order, and what makes a body of as many others, None if that cannot be."""

    texts: list[str]
    replaced: Callable[[Sequence[str]], Any]
    param: str  # of the body, which errors name


def chat_texts(body: ChatRequest, param: str = "messages") -> PromptTexts:
    """Of each message what is said and what was called, then the declarations of tools."""
    said = [message.text for message in body.messages]
    beside = [call.function.arguments for one in body.messages for call in one.tool_calls or ()]
    beside += [tool.function.model_dump_json(exclude_none=True) for tool in body.tools]

    def replaced(texts: Sequence[str]) -> ChatRequest | None:
        if list(texts[len(said) :]) != beside:
            return None  # arguments and declarations have a form that a rewrite may break
        messages = [_saying(message, text) for message, text in zip(body.messages, texts, strict=False)]
        return body.model_copy(update={"messages": messages})

    return PromptTexts([*said, *beside], replaced, param)


def completion_texts(body: CompletionRequest, text_of: Callable[[str | list[int]], str]) -> PromptTexts:
    """Of each prompt its text. text_of: a prompt's, which may be token ids."""
    prompts: list[Any] = body.prompts
    texts = [text_of(prompt) for prompt in prompts]

    def replaced(others: Sequence[str]) -> CompletionRequest:
        kept = zip(prompts, texts, others, strict=True)
        return body.model_copy(
            update={"prompt": [prompt if text == other else other for prompt, text, other in kept]}
        )

    return PromptTexts(texts, replaced, "prompt")


def _saying(message: Message, text: str) -> Message:
    if message.text == text:
        return message
    return message.model_copy(update={"content": text, "refusal": None})
