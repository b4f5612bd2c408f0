"""From bytes to a checked body. Every field is known, of the right type, or named in a 400 without its value.

A field that is null counts as absent, at every depth. Types are strict: "0.5" is no number, true no integer.
"""

from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

from cabochon.server.errors import ApiError

MAX_NAME_CHARS = 64  # of an unknown field that an error repeats
SCHEMAS = frozenset({"schema", "json", "parameters"})  # fields in which a null is a value
# Bounds on what pydantic gets to see: it holds the GIL, and reports on every entry of a list it cannot use.
MAX_ITEMS = 32768  # entries of all objects, and items of all lists of anything but integers, in a body
MAX_DEPTH = 100  # of objects and lists in each other: a tenth of what Python's stack holds


class Strict(BaseModel):
    """A part of a body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Body(Strict):
    """A whole body: what it accepts beside its fields, and how long its lists may be."""

    no_effect: ClassVar[frozenset[str]] = frozenset()  # any value, and nothing happens
    asks_nothing: ClassVar[dict[str, tuple[Any, ...]]] = {}  # not implemented: values that ask for nothing
    max_lengths: ClassVar[dict[str, tuple[int, str]]] = {}  # of lists, where pydantic would say less: of what


FORMATS = ("response_format", "format")  # fields that are told apart by their type
FORMAT_KINDS = ("text", "json_object", "json_schema")

Parsed = TypeVar("Parsed", bound=Body)


def parse(kind: type[Parsed], raw: bytes) -> Parsed:
    """The body as `kind`. Raises ApiError (400) that names the field and never shows its value."""
    try:
        content = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body must be JSON in UTF-8: {reason}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError("the body must be a JSON object: send {...}", code="invalid_json")
    fields = without_nulls({name: value for name, value in content.items() if name not in kind.no_effect})
    for name in fields.keys() & kind.asks_nothing.keys():
        given = fields.pop(name)
        if not any(type(given) is type(value) and given == value for value in kind.asks_nothing[name]):
            fine = "".join(f" or {msgspec.json.encode(v).decode()}" for v in kind.asks_nothing[name])
            raise ApiError(
                f"{name} must be absent{fine}: this server supports nothing else",
                param=name,
                code="unsupported_parameter",
            )
    for name, (limit, what) in kind.max_lengths.items():
        given = fields.get(name)
        if isinstance(given, list) and len(given) > limit and not isinstance(given[0], int):
            raise ApiError(
                f"{name} must have at most {limit} {what}, got {len(given)}: send fewer", param=name
            )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error) from None


def without_nulls(value: Any) -> Any:
    """Clients replay objects with fields they never set: a null is no value, at every depth.

    Raises ApiError if a body has more parts, or deeper ones, than could be meant.
    """
    return _Nulls().removed(value, 0)


class _Nulls:
    def __init__(self) -> None:
        self._num_items = 0

    def removed(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ApiError(
                f"the body must be nested at most {MAX_DEPTH} deep: flatten it", code="invalid_json"
            )
        if isinstance(value, dict):
            self._count(len(value))
            kept = {name: self.removed(item, depth + 1) for name, item in value.items() if item is not None}
            return kept | {name: value[name] for name in SCHEMAS & kept.keys()}
        if isinstance(value, list):
            kinds = set(map(type, value))
            if kinds == {int}:
                return value
            self._count(len(value))
            is_flat = kinds.isdisjoint((dict, list))
            return value if is_flat else [self.removed(item, depth + 1) for item in value]
        return value

    def _count(self, num_items: int) -> None:
        self._num_items += num_items
        if self._num_items > MAX_ITEMS:
            raise ApiError(
                f"the lists and objects of a body must have at most {MAX_ITEMS} items in all, token ids"
                " apart: send several bodies"
            )


def _first_error(error: ValidationError) -> ApiError:
    """Of a union's complaints, the one that got deepest into the value is the useful one."""
    errors = error.errors(include_input=False, include_url=False)
    unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    first = unknown or max(
        errors,
        key=lambda e: (e["loc"][:1] == errors[0]["loc"][:1], len(e["loc"]), e["loc"][-1:] == ("type",)),
    )
    *inner, last = _without_tags(first["loc"]) or ("the body",)
    names = [str(part) for part in inner if _is_name(part)]
    if unknown is not None:  # the last part is the client's own word, whatever it is
        where = ".".join([*names, str(last)[:MAX_NAME_CHARS]])
        return ApiError(
            f"{where} is not a parameter of this endpoint: leave it out",
            param=where,
            code="unknown_parameter",
        )
    where = ".".join([*names, str(last)] if _is_name(last) else names) or "the body"
    match first["type"]:
        case "missing":
            return ApiError(f"{where} must be given: add it", param=where, code="missing_required_parameter")
        case "union_tag_invalid":  # pydantic's message quotes the value
            where = f"{where}.type"
            return ApiError(
                f"{where} must be one of {first['ctx']['expected_tags']}: correct it", param=where
            )
    return ApiError(f"{where} is not valid: {first['msg']}", param=where)


def _without_tags(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic puts the kind of a format into the path, too; and keys of maps are the client's words."""
    if loc[:1] == ("logit_bias",):
        return loc[:1]
    tagged = [i for i in range(1, len(loc)) if loc[i - 1] in FORMATS and loc[i] in FORMAT_KINDS]
    return tuple(part for i, part in enumerate(loc) if i not in tagged)


def is_deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists stand in each other more than `limit` deep."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def _is_name(part: object) -> bool:
    """pydantic puts the union's branch into the path: list[str], constrained-str, NamedTool, ..."""
    return isinstance(part, int) or (
        isinstance(part, str) and part.isidentifier() and part not in ("str", "int") and not part[0].isupper()
    )
