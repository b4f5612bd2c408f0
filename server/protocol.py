"""Bodies of the OpenAI endpoints. Every parameter is implemented exactly, or refused by name.

A field that is null counts as absent, at every depth. Types are strict: "0.5" is no number, true no integer.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cabochon.engine.sampling_params import MAX_LOGPROBS, Grammar
from cabochon.server.errors import ApiError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_NAME_CHARS = 64  # of an unknown field that an error repeats
MAX_CHOICES = 128  # n, and prompts · n of one body
# Bounds on what pydantic gets to see: it holds the GIL, and reports on every entry of a list it cannot use.
SCHEMAS = frozenset({"schema", "json", "parameters"})  # fields in which a null is a value
MAX_ITEMS = 32768  # entries of all objects, and items of all lists of anything but integers, in a body

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
        "parallel_tool_calls",
        "prediction",
        "verbosity",
        "reasoning_effort",
    }
)
# Not implemented yet: fine as long as the value asks for nothing.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream says beside the text."""

    include_usage: bool = False  # a last chunk with the usage
    continuous_usage_stats: bool = False  # the usage on every chunk


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]

    def grammar(self) -> None:
        """Nothing binds it."""


class JsonFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]

    def grammar(self) -> Grammar:
        """An object with anything in it."""
        return _schema({"type": "object"}, "response_format")


class JsonSchema(_Strict):
    """OpenAI's wrapping of a JSON schema."""

    name: Annotated[str, Field(max_length=256)] = ""
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool = Field(True, description="The schema is enforced in any case")


class SchemaFormat(_Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def grammar(self) -> Grammar:
        """The schema's."""
        return _schema(self.json_schema.schema_, "response_format")


class StructuredOutputs(_Strict):
    """vLLM's field of that name: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    grammar_: str | None = Field(None, alias="grammar", description="Lark, or GBNF")
    json_object: bool | None = None

    def grammar(self) -> Grammar:
        """The one that is there. Raises ApiError if none or several are."""
        given = {
            name: value
            for name, value in self.model_dump(by_alias=True).items()
            if value not in (None, False)
        }
        if len(given) != 1:
            raise ApiError(
                "structured_outputs must have exactly one of json, regex, choice, grammar and json_object,"
                f" got {len(given)}: send one",
                param="structured_outputs",
            )
        ((name, value),) = given.items()
        match name:
            case "json":
                return _schema(value, "structured_outputs")
            case "json_object":
                return _schema({"type": "object"}, "structured_outputs")
            case "regex":
                return Grammar(kind="regex", text=value)
            case "choice":
                words = " | ".join(msgspec.json.encode(word).decode() for word in value)
                return Grammar(kind="lark", text=f"start: {words}")
        return Grammar(kind="lark", text=value)


def _schema(schema: dict[str, Any] | str, param: str) -> Grammar:
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Grammar(kind="json_schema", text=text, param=param)


class GenerationRequest(_Strict):
    """What chat and completions share."""

    model: str | None = Field(None, description="The served model; absent: the one there is")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: int | None = Field(None, description="Same seed, same tokens; choice i uses seed + i")
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=1024)
    min_tokens: int = 0
    stop: StopString | Stop = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=256, fail_fast=True)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    structured_outputs: StructuredOutputs | None = None

    def grammar(self) -> Grammar | None:
        """What the output must follow. Raises ApiError if two things are asked for."""
        formats = self.response_format
        asked = None if formats is None else formats.grammar()
        if self.structured_outputs is None:
            return asked
        if asked is not None:
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
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class TextPart(_Strict):
    """A part of a message; only text."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: set it to true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None


TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0)] = 16  # OpenAI's default; 0 with echo
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _some_output(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens must be at least 1 without echo, got 0: raise it", param="max_tokens")
        return self


class TokenizeRequest(_Strict):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True  # of a prompt; the template of messages writes its own
    add_generation_prompt: bool = True
    return_token_strs: bool = False  # the pieces of the vocabulary, too


class DetokenizeRequest(_Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes) -> Body:
    """The body as `kind`. Raises ApiError (400) that names the field and never shows its value."""
    try:
        content = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body must be JSON in UTF-8: {reason}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError("the body must be a JSON object: send {...}", code="invalid_json")
    try:
        whole = without_nulls(content)
        fields = {name: value for name, value in whole.items() if name not in NO_EFFECT}
    except RecursionError:
        raise ApiError("the body must not be nested so deeply: flatten it", code="invalid_json") from None
    for name, harmless in ASKS_NOTHING.items():
        if name in fields and name not in kind.model_fields:
            if not any(type(fields[name]) is type(value) and fields[name] == value for value in harmless):
                raise ApiError(
                    f"{name} must be absent: this server does not support it yet",
                    param=name,
                    code="unsupported_parameter",
                )
            del fields[name]
    _check_lengths(fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error) from None


def without_nulls(value: Any) -> Any:
    """Clients replay objects with fields they never set: a null is no value, at every depth.

    Raises ApiError if a body has more parts than could be meant.
    """
    return _Nulls().removed(value)


class _Nulls:
    def __init__(self) -> None:
        self._num_items = 0

    def removed(self, value: Any) -> Any:
        if isinstance(value, dict):
            self._count(len(value))
            kept = {name: self.removed(item) for name, item in value.items() if item is not None}
            return kept | {name: value[name] for name in SCHEMAS & kept.keys()}
        if isinstance(value, list):
            kinds = set(map(type, value))
            if kinds == {int}:
                return value
            self._count(len(value))
            return value if kinds.isdisjoint((dict, list)) else [self.removed(item) for item in value]
        return value

    def _count(self, num_items: int) -> None:
        self._num_items += num_items
        if self._num_items > MAX_ITEMS:
            raise ApiError(
                f"the lists and objects of a body must have at most {MAX_ITEMS} items in all, token ids"
                " apart: send several bodies"
            )


def _check_lengths(fields: dict[str, Any]) -> None:
    """pydantic would complain of the other kinds that a union allows."""
    stop, prompt = fields.get("stop"), fields.get("prompt")
    if isinstance(stop, list) and len(stop) > MAX_STOP_STRINGS:
        raise ApiError(
            f"stop must have at most {MAX_STOP_STRINGS} strings, got {len(stop)}: send fewer", param="stop"
        )
    if isinstance(prompt, list) and len(prompt) > MAX_CHOICES and not isinstance(prompt[0], int):
        raise ApiError(
            f"prompt must be at most {MAX_CHOICES} prompts, got {len(prompt)}: send several bodies",
            param="prompt",
        )


def _first_error(error: ValidationError) -> ApiError:
    """Of a union's complaints, the one that got deepest into the value is the useful one."""
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    first = unknown or max(errors, key=lambda e: (e["loc"][:1] == errors[0]["loc"][:1], len(e["loc"])))
    *inner, last = first["loc"] or ("the body",)
    names = [str(part) for part in inner if _is_name(part)]
    if unknown is not None:  # the last part is the client's own word, whatever it is
        where = ".".join([*names, str(last)[:MAX_NAME_CHARS]])
        return ApiError(
            f"{where} is not a parameter of this endpoint: leave it out",
            param=where,
            code="unknown_parameter",
        )
    where = ".".join([*names, str(last)] if _is_name(last) else names) or "the body"
    if first["type"] == "missing":
        return ApiError(f"{where} must be given: add it", param=where, code="missing_required_parameter")
    return ApiError(f"{where} is not valid: {first['msg']}", param=where)


def _is_name(part: object) -> bool:
    """pydantic puts the union's branch into the path: list[str], constrained-str, ..."""
    return isinstance(part, int) or (
        isinstance(part, str) and part.isidentifier() and part not in ("str", "int")
    )
