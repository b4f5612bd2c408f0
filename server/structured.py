"""The fields by which a body asks for a form of its answer, each as the grammar that the engine enforces."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from cabochon.engine.sampling_params import Grammar
from cabochon.server.body import Strict
from cabochon.server.errors import ApiError


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"] = Field(description="Any text")

    def schema_(self) -> None:
        """Nothing binds it."""


class JsonFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"] = Field(description="A JSON object with anything in it")

    def schema_(self) -> dict[str, Any]:
        """An object with anything in it."""
        return {"type": "object"}


class JsonSchema(Strict):
    """OpenAI's wrapping of a JSON schema."""

    name: Annotated[str, Field(max_length=256)] = Field("", description="For the client; no effect")
    description: str = Field("", description="For the client; no effect")
    json_schema: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object"}, alias="schema", description="The answer follows it"
    )
    strict: bool = Field(True, description="The schema is enforced in any case")


class SchemaFormat(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"] = Field(description="JSON that the schema describes")
    json_schema: JsonSchema = Field(description="The schema, in OpenAI's wrapping")

    def schema_(self) -> dict[str, Any]:
        """The schema itself."""
        return self.json_schema.json_schema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's field of that name: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema")
    regex: str | None = Field(None, description="A regular expression that the whole answer matches")
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="The answer is one of these"
    )
    grammar_: str | None = Field(
        None, alias="grammar", description="A grammar in Lark (llguidance's dialect) or GBNF"
    )
    json_object: bool | None = Field(None, description="true: any JSON object")

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
                return schema_grammar(value, "structured_outputs")
            case "json_object":
                return schema_grammar({"type": "object"}, "structured_outputs")
            case "regex":
                return Grammar(kind="regex", text=value)
            case "choice":
                words = " | ".join(msgspec.json.encode(word).decode() for word in value)
                # One terminal: as alternatives of a rule, 2,000 of them are too many
                return Grammar(kind="lark", text=f"start: CHOICE\nCHOICE: {words}")
        return Grammar(kind="lark_or_gbnf", text=value)


def schema_grammar(schema: dict[str, Any] | str, param: str) -> Grammar:
    """What follows a JSON schema. param: the field that errors name."""
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Grammar(kind="json_schema", text=text, param=param)
