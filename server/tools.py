"""Functions that a model may call: their fields, how they stand in a prompt, the grammar of a call.

Gemma 2 and 3 know no tool tokens. Google documents a prompt for them (ai.google.dev/gemma/docs, Function
calling): the functions stand before the first user text, a call is {"name": ..., "parameters": {...}} and
nothing else, and its result comes back in a user turn between ```tool_output and ```. A checkpoint whose own
template knows tools gets them its own way (chat.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from cabochon.engine.json_schema import rewritten
from cabochon.engine.sampling_params import JSON_WHITESPACE, Grammar
from cabochon.server.body import MAX_DEPTH, Strict, is_deeper
from cabochon.server.errors import ApiError
from cabochon.server.structured import schema_grammar

MAX_TOOLS = 128  # OpenAI's limit
MAX_CALLS = 16  # in one answer that a grammar binds
MAX_REQUIRED_CALLS = 4  # in one that must call: a model that repeats itself must come to an end
CALL_OPENING = r"(?:```[a-z_]*\s*|<tool_call>\s*)?"  # what models write before a call
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_PARAMETERS: dict[str, Any] = {"type": "object"}
PREAMBLE = """You have access to functions. If you decide to invoke any of the function(s),
you MUST put it in the format of
{"name": function name, "parameters": dictionary of argument name and its value}
"""
PARALLEL = "To invoke several at once, put a list of these in square brackets.\n"
END_OF_PREAMBLE = "\nYou SHOULD NOT include any other text in the response if you call a function\n"

Call = tuple[str, str]  # a function's name, and its arguments in JSON


class Function(Strict):
    """What a function is called, does and takes."""

    name: FunctionName = Field(description="Letters, digits, _ and -, 64 at most")
    description: str = Field("", description="When to call it, for the model")
    parameters: dict[str, Any] = Field(
        default_factory=lambda: dict(NO_PARAMETERS), description="JSON schema of its arguments, an object"
    )
    strict: bool = Field(False, description="Arguments follow the schema, whatever tool_choice is")


class Tool(Strict):
    """OpenAI's wrapping of a function."""

    type: Literal["function"] = Field(description="Only functions are supported")
    function: Function = Field(description="The function")


class FunctionChoice(Strict):
    """A function by its name."""

    name: FunctionName = Field(description="One of tools")


class NamedTool(Strict):
    """The one function that must be called."""

    type: Literal["function"] = Field(description="Only functions are supported")
    function: FunctionChoice = Field(description="The function")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request may call, and must."""

    functions: tuple[Function, ...]  # all that the model is told of
    choice: Literal["auto", "required", "named"]
    named: str | None = None  # the one function, if one is named
    is_parallel: bool  # several calls in one answer

    @property
    def names(self) -> frozenset[str]:
        """Of all functions."""
        return frozenset(function.name for function in self.functions)

    def finish_reason(self, reason: str | None, *, has_called: bool) -> str | None:
        """OpenAI's word: an answer that called says so, unless the call was prescribed by name."""
        is_call = reason == "stop" and has_called and self.choice != "named"
        return "tool_calls" if is_call else reason

    def grammar(self, answer: dict[str, Any] | None) -> Grammar | None:
        """Of the whole output; None: nothing binds it. answer: the schema of text that is no call."""
        for function in self.functions:  # before anything is done with a schema that is too large
            schema_grammar(self._parameters(function), "tools")
        if self.choice != "auto":
            return schema_grammar(self._schema(None), "tools")
        is_bound = not self.is_parallel or any(function.strict for function in self.functions)
        if answer == {"type": "object"} and is_bound:
            raise ApiError(
                "response_format must not be json_object beside strict functions or one call at most: any"
                " call would be such an object; send a json_schema",
                param="response_format",
            )
        if answer is not None:
            schema_grammar(answer, "response_format")
            return schema_grammar(self._schema(answer), "response_format")
        if not is_bound:
            return None
        return Grammar(kind="lark", text=self._text_or_calls(), param="tools")

    def _schema(self, answer: dict[str, Any] | None) -> dict[str, Any]:
        """Of a call, of several, or of the answer. $defs hold the clients' schemas."""
        is_named = self.choice == "named"
        allowed = [one for one in self.functions if not is_named or one.name == self.named]
        definitions = {f"p{i}": self._parameters(one) for i, one in enumerate(allowed)}
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "parameters": {"$ref": f"#/$defs/p{i}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for i, function in enumerate(allowed)
        ]
        options = list(calls)
        if self.is_parallel and not is_named:
            options.append(
                {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": MAX_REQUIRED_CALLS}
            )
        if answer is not None:
            definitions["answer"] = answer
            options.append({"$ref": "#/$defs/answer"})
        moved = {name: _moved(schema, f"#/$defs/{name}") for name, schema in definitions.items()}
        return {"anyOf": options, "$defs": moved}

    def _text_or_calls(self) -> str:
        """Lark: text that does not begin like a call, or calls.

        The lexer is greedy: the text must be impossible from the colon on, where the literal still is not.
        """
        name = json.dumps('{"name": ')
        names = [json.dumps(f'"{one.name}", "parameters": ') for one in self.functions]
        rules = ["start: TEXT | call", f'call: {name} one "}}"']
        if self.is_parallel:
            first, more = json.dumps('[{"name": '), json.dumps(', {"name": ')
            rules[0] += " | calls"
            rules.append(f'calls: {first} one "}}" ({more} one "}}"){{0,{MAX_CALLS - 1}}} "]"')
        rules.append("one: " + " | ".join(f"{literal} p{i}" for i, literal in enumerate(names)))
        for i, function in enumerate(self.functions):
            schema = {**self._parameters(function), "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
            rules.append(f"p{i}: %json {msgspec.json.encode(schema).decode()}")
        call = rf'\s*{CALL_OPENING}\[?\s*\{{\s*"name"\s*:'
        rules.append(f"TEXT: /(?s:.+)/ & ~/{call}(?s:.*)/")
        return "\n".join(rules)

    def _parameters(self, function: Function) -> dict[str, Any]:
        if self.choice == "auto" and not function.strict:
            return ANY_PARAMETERS
        return {**function.parameters, "type": "object"}


def _moved(schema: dict[str, Any], base: str) -> Any:
    """The schema with its references to itself as they must be when it stands at `base`."""

    def move(one: dict[str, Any]) -> dict[str, Any]:
        # References would be looked up at an id of its own
        moved = {key: value for key, value in one.items() if key != "$id"}
        target = one.get("$ref")
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            moved["$ref"] = base + target[1:]
        return moved

    return rewritten(schema, move)


def tool_use(
    functions: Sequence[Function],
    choice: Literal["none", "auto", "required"] | None,
    *,
    named: str | None = None,
    is_parallel: bool = True,
) -> ToolUse | None:
    """named: the function that must be called. Raises ApiError if they do not fit."""
    if named is None and (choice == "none" or (not functions and choice != "required")):
        return None
    if not functions:
        raise ApiError("tool_choice needs tools: send some, or leave it out", param="tool_choice")
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise ApiError("tools must have names of their own, two share one: rename one", param="tools")
    for index, function in enumerate(functions):
        if function.parameters.get("type") not in (None, "object", ["object"]):
            where = f"tools.{index}.function.parameters"
            raise ApiError(f"{where} must be a schema of type object: correct it", param=where)
    if named is not None and named not in names:
        raise ApiError("tool_choice must name one of tools: correct it", param="tool_choice")
    mode: Literal["auto", "required", "named"] = "required" if choice == "required" else "auto"
    return ToolUse(
        functions=tuple(functions),
        choice=mode if named is None else "named",
        named=named,
        is_parallel=is_parallel,
    )


def described(function: Function) -> dict[str, Any]:
    """What a model is told of it."""
    return {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
    }


def declaration(functions: Sequence[Function], *, is_parallel: bool) -> str:
    """What stands before the first user text."""
    text = json.dumps(list(map(described, functions)), indent=2, ensure_ascii=False)
    return f"{PREAMBLE}{PARALLEL if is_parallel else ''}{END_OF_PREAMBLE}{text}\n"


def calls_text(calls: Sequence[Call]) -> str:
    """Calls as the model is asked to write them: arguments go back as they came, right or wrong."""
    written = [f'{{"name": "{name}", "parameters": {arguments or "{}"}}}' for name, arguments in calls]
    return written[0] if len(written) == 1 else f"[{', '.join(written)}]"


def output_text(output: str) -> str:
    """A function's result as the model is told of it."""
    return f"```tool_output\n{output}\n```"


def arguments_value(arguments: str) -> Mapping[str, Any] | str:
    """Arguments for a template that knows tools: an object, or as they came if they are none."""
    try:
        value = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and not is_deeper(value, MAX_DEPTH) else arguments
