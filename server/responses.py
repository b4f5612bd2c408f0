"""The body of /v1/responses, and the chat that it asks for. Nothing is stored: a body brings its history."""

import re
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from cabochon.engine.errors import RequestError
from cabochon.engine.sampling_params import MAX_LOGPROBS, Grammar
from cabochon.server.body import Strict
from cabochon.server.errors import ApiError
from cabochon.server.protocol import (
    NO_EFFECT,
    CalledFunction,
    ChatRequest,
    Message,
    SamplingFields,
    ToolCall,
    check_turns,
)
from cabochon.server.structured import JsonFormat, JsonSchema, SchemaFormat, TextFormat
from cabochon.server.tools import (
    MAX_TOOLS,
    Function,
    FunctionChoice,
    FunctionName,
    NamedTool,
    Tool,
)

# The chat's fields in errors, as this endpoint calls them. Its messages have other numbers.
RENAMED = [
    (re.compile(rf"\b{chats}\b"), ours)
    for chats, ours in {
        r"messages(\.\d+)?": "input",
        "response_format": "text.format",
        "max(_completion)?_tokens": "max_output_tokens",
        "tool_call_id": "call_id",
        r"(tools\.\d+)\.function": r"\1",
    }.items()
]


class InputText(Strict):
    """A part of a message."""

    type: Literal["input_text", "output_text"] = Field(description="Only text is supported")
    text: str = Field(description="The text")
    annotations: list[Any] = Field(default_factory=list, description="No effect")
    logprobs: list[Any] = Field(default_factory=list, description="No effect")


class InputRefusal(Strict):
    """A part of an earlier answer."""

    type: Literal["refusal"] = Field(description="What was said instead")
    refusal: str = Field(description="The text")

    @property
    def text(self) -> str:
        return self.refusal


class _Item(Strict):
    id: str | None = Field(None, description="No effect")
    status: str | None = Field(None, description="No effect")


Part = Annotated[InputText | InputRefusal, Field(discriminator="type")]
Texts = str | Annotated[list[Part], Field(fail_fast=True)]


class InputMessage(_Item):
    """What somebody said."""

    type: Literal["message"] = Field("message", description="May be absent")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who")
    content: Texts = Field(description="What")
    phase: str | None = Field(None, description="No effect")


class InputCall(_Item):
    """A function that the model called."""

    type: Literal["function_call"] = Field(description="A call in the history")
    call_id: Annotated[str, Field(max_length=128)] = Field(description="The id that the answer gave it")
    name: FunctionName = Field(description="The function")
    arguments: str = Field(description="Its arguments in JSON, as the model wrote them")


class InputCallOutput(_Item):
    """What the function gave back."""

    type: Literal["function_call_output"] = Field(description="The result of a call")
    call_id: Annotated[str, Field(max_length=128)] = Field(description="Which call")
    output: Texts = Field(description="The result")


def _kind(item: Any) -> str:
    """The tag of an item; only messages may leave it out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "")
    return f"item {kind}" if kind in ("message", "function_call", "function_call_output") else ""


InputItem = Annotated[
    Annotated[InputMessage, Tag("item message")]
    | Annotated[InputCall, Tag("item function_call")]
    | Annotated[InputCallOutput, Tag("item function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="items must be of type message, function_call or function_call_output",
    ),
]


class FlatTool(Function):
    """A function, as this endpoint writes tools."""

    type: Literal["function"] = Field(description="Only functions are supported")
    strict: bool = Field(True, description="Arguments follow the schema, whatever tool_choice is")


class NamedFunction(FunctionChoice):
    """The one function that must be called."""

    type: Literal["function"] = Field(description="Only functions are supported")


class FlatSchemaFormat(JsonSchema):
    """JSON that a schema describes."""

    type: Literal["json_schema"] = Field(description="JSON that the schema describes")


class TextOptions(Strict):
    """The form of the text."""

    format: Annotated[TextFormat | JsonFormat | FlatSchemaFormat, Field(discriminator="type")] | None = Field(
        None, description="The form of the answer"
    )
    verbosity: str | None = Field(None, description="No effect")


class ResponsesRequest(SamplingFields):
    """POST /v1/responses"""

    no_effect: ClassVar = (NO_EFFECT - {"prediction", "verbosity", "reasoning_effort", "metadata"}) | {
        "stream_options",
        "reasoning",
        "max_tool_calls",
    }
    asks_nothing: ClassVar = {
        "background": (False,),
        "truncation": ("disabled",),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
    }

    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)] = Field(
        description="A text, or the conversation so far"
    )
    instructions: str | None = Field(None, description="A system message before it")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Comes back with the answer")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Tokens of the answer at most; absent: what the context holds"
    )
    text: TextOptions = Field(default_factory=TextOptions, description="The form of the text")
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list, description="Functions that the model may call"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = Field(
        None, description="Whether it must call one, or which"
    )
    parallel_tool_calls: bool = Field(True, description="false: one call at most")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        default_factory=list, max_length=8, fail_fast=True, description="What the answer has beside the text"
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = Field(
        0, description="With message.output_text.logprobs: likeliest tokens at each place"
    )

    def as_chat(self) -> ChatRequest:
        """The same in the words of /v1/chat/completions. Raises ApiError if items do not fit together."""
        has_logprobs = "message.output_text.logprobs" in self.include
        if self.top_logprobs and not has_logprobs:
            raise ApiError(
                "top_logprobs needs message.output_text.logprobs in include: add it", param="top_logprobs"
            )
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunction):
            choice = NamedTool(type="function", function=FunctionChoice(name=choice.name))
        messages = self._messages()
        if any(len(message.tool_calls or ()) > MAX_TOOLS for message in messages):
            raise ApiError(f"input must have at most {MAX_TOOLS} calls in a turn: send fewer", param="input")
        check_turns(messages)
        return _Chat.model_construct(  # of checked parts
            **{name: getattr(self, name) for name in SamplingFields.model_fields},
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            logprobs=has_logprobs,
            top_logprobs=self.top_logprobs,
            response_format=self._format(),
            tools=[Tool(type="function", function=tool) for tool in self.tools],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
        )

    def _format(self) -> TextFormat | JsonFormat | SchemaFormat | None:
        given = self.text.format
        if not isinstance(given, FlatSchemaFormat):
            return given
        return SchemaFormat(type="json_schema", json_schema=JsonSchema(schema=given.json_schema))

    def _messages(self) -> list[Message]:
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = []
        if self.instructions is not None:
            messages.append(Message(role="system", content=self.instructions))
        for item in items:
            match item:
                case InputMessage():
                    text = _text(item.content)
                    if item.role == "assistant" and messages and messages[-1].role == "assistant":
                        before = messages[-1].text  # text behind a call is of the same turn
                        messages[-1].content = f"{before}\n{text}" if before else text
                    else:
                        messages.append(Message(role=item.role, content=text))
                case InputCall():
                    if not messages or messages[-1].role != "assistant":
                        messages.append(Message(role="assistant"))
                    if messages[-1].tool_calls is None:
                        messages[-1].tool_calls = []
                    called = CalledFunction(name=item.name, arguments=item.arguments)
                    messages[-1].tool_calls.append(ToolCall(id=item.call_id, function=called))
                case InputCallOutput():
                    messages.append(
                        Message(role="tool", content=_text(item.output), tool_call_id=item.call_id)
                    )
        return messages


class _Chat(ChatRequest):
    """A chat whose errors name the fields of this endpoint."""

    def grammar(self) -> Grammar | None:
        grammar = super().grammar()
        return grammar and replace(grammar, param=_renamed(grammar.param))


def in_our_words(error: RequestError | ApiError) -> None:
    """Rename what an error of the chat names."""
    error.args = (_renamed(str(error)),)
    error.param = error.param and _renamed(error.param)


def _renamed(text: str) -> str:
    for pattern, ours in RENAMED:
        text = pattern.sub(ours, text)
    return text


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
