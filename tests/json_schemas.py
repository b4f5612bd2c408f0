"""Twenty schemas that ask for every kind of value: nested, enums, references, unicode, numbers.

Strings, arrays and maps are bounded, and nothing refers to itself; numbers may have any number of digits.
"""

from typing import Any

Schema = dict[str, Any]


def text(most: int = 20, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def record(**properties: Schema) -> Schema:
    """All properties required, no others."""
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def several(items: Schema, most: int = 4, **more: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": most, **more}


INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
PERCENT: Schema = {"type": "integer", "minimum": 0, "maximum": 100}
TREE: Schema = {
    "$defs": {
        "leaf": record(value=INTEGER),
        "twig": record(value=INTEGER, leaves=several({"$ref": "#/$defs/leaf"}, 2)),
        "branch": record(value=INTEGER, twigs=several({"$ref": "#/$defs/twig"}, 2)),
    },
    "$ref": "#/$defs/branch",
}
ADDRESS: Schema = record(street=text(), city=text(12), zip={"type": "string", "pattern": "^[0-9]{5}$"})
FORMATS = ("date", "time", "uuid", "ipv4")

SCHEMAS: dict[str, Schema] = {
    "person": record(name=text(), age=PERCENT, is_member=BOOLEAN),
    "numbers": record(a=NUMBER, b=INTEGER, c=several(NUMBER, 3)),
    "ranges": record(
        low={"type": "number", "minimum": -1, "maximum": 1},
        high={"type": "integer", "exclusiveMinimum": 1000, "exclusiveMaximum": 2000},
        step={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    ),
    "enums": record(colour={"enum": ["red", "grün", "青"]}, size={"enum": [1, 2.5, None, "XL"]}),
    "const": record(kind={"const": "gem"}, version={"const": 3}, note=text(10)),
    "nested": record(a=record(b=record(c=record(d=record(e=BOOLEAN))))),
    "references": {
        "$defs": {"address": ADDRESS},
        **record(home={"$ref": "#/$defs/address"}, work={"$ref": "#/$defs/address"}),
    },
    "tree": TREE,
    "list": record(first={"$ref": "#/$defs/item"}, rest=several({"$ref": "#/$defs/item"}))
    | {"$defs": {"item": {"anyOf": [INTEGER, {"type": "null"}, record(head=BOOLEAN)]}}},
    "matrix": several(several(INTEGER, 3, minItems=3), 3, minItems=2),
    "unicode names": record(**{"имя": text(), "年齢": PERCENT, "naïve \"quoted\"": BOOLEAN, "🙂": text(5)}),
    "unicode values": several({"enum": ["ß", "€", "𝄞", "\u2028", "a\"b\\c", "\n\t"]}, 6, minItems=3),
    "any of": several({"anyOf": [text(8), INTEGER, BOOLEAN, {"type": "null"}, record(x=NUMBER)]}, 4),
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": text(5)}, "required": ["b"]},
        ],
        "properties": {"a": {}, "b": {}},
        "additionalProperties": False,
    },
    "optional": {"type": "object", "properties": {"a": INTEGER, "b": text(5), "c": BOOLEAN},
                 "additionalProperties": False},
    "map": {"type": "object", "properties": {"id": INTEGER}, "required": ["id"],
            "patternProperties": {"^x-[a-z]{1,4}$": BOOLEAN}, "additionalProperties": False,
            "maxProperties": 5},
    "tuple": {"type": "array", "prefixItems": [text(6), INTEGER, BOOLEAN], "items": False, "minItems": 3},
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2,4}$"}, mail=text(minLength=3)),
    "formats": record(**{name: {"type": "string", "format": name} for name in FORMATS}),
    "types": record(value={"type": ["string", "integer", "null"], "maxLength": 9}, items=several(PERCENT, 5)),
}  # fmt: skip
