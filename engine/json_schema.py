"""Changes to every schema within a JSON schema, and to nothing that only looks like one."""

from collections.abc import Callable
from typing import Any

VALUES = frozenset({"const", "enum", "default", "examples"})  # no schemas, whatever they look like
# Maps from any name to a schema
MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})


def rewritten(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy in which `change` has been called on each schema that is an object, before those in it."""
    if isinstance(schema, list):
        return [rewritten(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _within(key, value, change) for key, value in change(schema).items()}


def _within(key: str, value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if key in VALUES:
        return value
    if key in MAPS and isinstance(value, dict):
        return {name: rewritten(item, change) for name, item in value.items()}
    return rewritten(value, change)
