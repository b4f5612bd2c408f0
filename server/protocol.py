"""Bodies of the OpenAI endpoints. Every parameter is implemented exactly, or refused by name."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cabochon.engine.sampling_params import MAX_LOGPROBS, Grammar
from cabochon.server.body import Body, Strict
from cabochon.server.errors import ApiError
from cabochon.server.structured import ResponseFormat, StructuredOutputs, schema_grammar
from cabochon.server.tools import MAX_TOOLS, FunctionName, NamedTool, Tool, ToolUse, tool_use

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 128  # n, and prompts · n of one body

# Accepted, and of no effect on a self-hosted model.
NO_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "verbosity",
        "reasoning_effort",
    }
)
# Not implemented: fine as long as the value asks for nothing.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]


class StreamOptions(Strict):
    """What a stream says beside the text."""

    include_usage: bool = Field(False, description="A last chunk with the usage")
    continuous_usage_stats: bool = Field(False, description="The usage on every chunk")
    include_obfuscation: bool = Field(False, description="No effect")


class SamplingFields(Body):
    """How tokens are chosen, and what else every endpoint that generates shares."""

    max_lengths: ClassVar = {"stop": (MAX_STOP_STRINGS, "strings")}

    model: str | None = Field(None, description="The served model or an adapter; absent: the model")
    stream: bool = Field(False, description="Server-sent events instead of one answer")
    seed: int | None = Field(None, description="Same seed, same tokens; choice i uses seed + i")
    temperature: float = Field(1.0, description="[0, 100]; 0 is greedy")
    top_p: float = Field(1.0, description="(0, 1]: the likeliest tokens of that probability together")
    top_k: int = Field(0, description="The likeliest k tokens; 0: all")
    min_p: float = Field(0.0, description="[0, 1]: at least that share of the likeliest token's probability")
    presence_penalty: float = Field(
        0.0, description="[-2, 2]: off a token's logit once it has been generated"
    )
    frequency_penalty: float = Field(
        0.0, description="[-2, 2]: off a token's logit each time it was generated"
    )
    repetition_penalty: float = Field(
        1.0, description="(0, 100]: divides positive logits of tokens of prompt and output"
    )
    logit_bias: dict[str, float] = Field(
        default_factory=dict, max_length=1024, description="Token id to [-100, 100], added to its logit"
    )
    min_tokens: int = Field(0, description="No stop token or stop string before that many tokens")
    stop: StopString | Stop = Field(
        default_factory=list, description="Strings before which the text ends, 16 at most"
    )
    stop_token_ids: list[int] = Field(
        default_factory=list,
        max_length=256,
        fail_fast=True,
        description="End the text, beside the model's own",
    )
    include_stop_str_in_output: bool = Field(False, description="What ended the text is shown")
    skip_special_tokens: bool = Field(True, description="Control tokens are not shown")
    ignore_eos: bool = Field(False, description="The model's own stop tokens do not end the text")
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = Field(0, description="Smaller is served first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Prompts share cached prefixes only with those of the same salt"
    )
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = Field(
        None, description="Part of the answer's id, instead of X-Request-Id"
    )
    structured_outputs: StructuredOutputs | None = Field(None, description="What the answer must look like")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class GenerationRequest(SamplingFields):
    """What chat and completions share."""

    no_effect: ClassVar = NO_EFFECT
    asks_nothing: ClassVar = ASKS_NOTHING

    stream_options: StreamOptions | None = Field(None, description="What a stream says beside the text")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = Field(1, description="Choices per prompt")
    response_format: ResponseFormat | None = Field(None, description="The form of the answer")

    def grammar(self) -> Grammar | None:
        """What the output must follow. Raises ApiError if two things are asked for."""
        schema = None if self.response_format is None else self.response_format.schema_()
        if self.structured_outputs is None:
            return None if schema is None else schema_grammar(schema, "response_format")
        if schema is not None:
            raise ApiError(
                "only one of response_format and structured_outputs may ask for a form: leave one out",
                param="structured_outputs",
            )
        return self.structured_outputs.grammar()

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None: report nothing."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None


class TextPart(Strict):
    """A part of a message; only text."""

    type: Literal["text"] = Field(description="Only text is supported")
    text: str = Field(description="The text")


class CalledFunction(Strict):
    """What a model called."""

    name: FunctionName = Field(description="The function")
    arguments: str = Field(description="Its arguments in JSON, as the model wrote them")
    parsed_arguments: Any = Field(None, description="No effect: clients add it")


class ToolCall(Strict):
    """A call that the model made in an earlier turn."""

    id: Annotated[str, Field(max_length=128)] = Field(description="The id that the answer gave it")
    type: Literal["function"] = Field("function", description="Only functions are supported")
    function: CalledFunction = Field(description="What was called")


Texts = str | Annotated[list[TextPart], Field(fail_fast=True)]


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks")
    content: Texts | None = Field(None, description="What is said; may be absent beside tool_calls")
    name: str | None = Field(None, description="No effect")
    refusal: str | None = Field(None, description="What an assistant said instead of content")
    annotations: list[Any] = Field(default_factory=list, description="No effect")
    parsed: Any = Field(None, description="No effect: clients add it")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="Of an assistant: what it called"
    )
    tool_call_id: Annotated[str, Field(max_length=128)] | None = Field(
        None, description="Of a tool: which call this is the result of"
    )

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or self.refusal or ""
        return "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


def check_turns(messages: list[Message]) -> None:
    """Calls and their results belong together. Raises ApiError that names the message."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if message.tool_calls and message.role != "assistant":
            raise ApiError(
                f"{where}.tool_calls must be an assistant's: leave it out", param=f"{where}.tool_calls"
            )
        if (message.tool_call_id is not None) != (message.role == "tool"):
            raise ApiError(
                f"{where}.tool_call_id must be in the messages of role tool, and only there: correct it",
                param=f"{where}.tool_call_id",
            )
        if message.content is None and not message.tool_calls and message.refusal is None:
            raise ApiError(
                f"{where}.content must be given: add it",
                param=f"{where}.content",
                code="missing_required_parameter",
            )
        if message.role == "tool" and message.tool_call_id not in called:
            raise ApiError(
                f"{where}.tool_call_id must be the id of a call in the assistant's message before it:"
                " send that message too",
                param=f"{where}.tool_call_id",
            )
        if message.role != "tool":
            called = {call.id for call in message.tool_calls or ()}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Messages = Field(description="The chat so far")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Tokens of the answer at most; absent: what the context holds"
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The newer name of max_tokens"
    )
    logprobs: bool = Field(False, description="Log probabilities of the answer's tokens")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = Field(
        0, description="With logprobs: likeliest tokens at each place"
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list, description="Functions that the model may call"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Whether it must call one, or which"
    )
    parallel_tool_calls: bool = Field(True, description="false: one call at most")

    @model_validator(mode="after")
    def _turns_fit(self) -> Self:
        check_turns(self.messages)
        return self

    def tool_use(self) -> ToolUse | None:
        """What may be called. Raises ApiError if tools and tool_choice do not fit."""
        choice, is_parallel = self.tool_choice, self.parallel_tool_calls
        functions = [tool.function for tool in self.tools]
        if isinstance(choice, NamedTool):
            return tool_use(functions, None, named=choice.function.name, is_parallel=is_parallel)
        return tool_use(functions, choice, is_parallel=is_parallel)

    def grammar(self) -> Grammar | None:
        """That of the calls, if there are tools."""
        use = self.tool_use()
        if use is None:
            return super().grammar()
        if self.structured_outputs is not None:
            raise ApiError(
                "structured_outputs must not be sent with tools: use response_format",
                param="structured_outputs",
            )
        return use.grammar(None if self.response_format is None else self.response_format.schema_())

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: set it to true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None


TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    max_lengths: ClassVar = {"stop": (MAX_STOP_STRINGS, "strings"), "prompt": (MAX_CHOICES, "prompts")}

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    ) = Field(description="A text, a list of token ids, or a list of either")
    max_tokens: Annotated[int, Field(ge=0)] = Field(
        16, description="Tokens of the answer at most; 0 with echo: only the prompt"
    )
    echo: bool = Field(False, description="The prompt stands before the answer")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | Literal[False] | None = Field(
        None, description="Log probabilities, and that many likeliest tokens at each place"
    )

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def num_logprobs(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.num_logprobs if self.echo else None

    @model_validator(mode="after")
    def _some_output(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens must be at least 1 without echo, got 0: raise it", param="max_tokens")
        return self


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages through the chat template."""

    no_effect: ClassVar = NO_EFFECT

    model: str | None = Field(None, description="The served model or an adapter; absent: the model")
    prompt: str | None = Field(None, description="A text")
    messages: Messages | None = Field(None, description="Or a chat")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list, description="With messages: functions that the model may call"
    )
    add_special_tokens: bool = Field(
        True, description="<bos> before a prompt; the template of messages writes its own"
    )
    add_generation_prompt: bool = Field(True, description="With messages: open the model's turn")
    return_token_strs: bool = Field(False, description="The pieces of the vocabulary, too")


class DetokenizeRequest(Body):
    """POST /detokenize"""

    no_effect: ClassVar = NO_EFFECT

    model: str | None = Field(None, description="The served model or an adapter; absent: the model")
    tokens: Annotated[list[int], Field(fail_fast=True)] = Field(description="Token ids")
