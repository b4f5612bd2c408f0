"""Every schema within a schema is changed, names and values are not."""

from typing import Any

import pytest

from cabochon.engine.json_schema import MAPS, VALUES, rewritten


def marked(schema: Any) -> Any:
    return rewritten(schema, lambda one: {**one, "seen": 1})


@pytest.mark.parametrize(
    ("schema", "changed"),
    [
        (True, True),
        ({}, {"seen": 1}),
        ({"items": {}}, {"items": {"seen": 1}, "seen": 1}),
        ({"anyOf": [{}, False]}, {"anyOf": [{"seen": 1}, False], "seen": 1}),
        ({"properties": {"const": {}}}, {"properties": {"const": {"seen": 1}}, "seen": 1}),
        ({"properties": {"properties": {}}}, {"properties": {"properties": {"seen": 1}}, "seen": 1}),
    ],
    ids=str,
)
def test_schemas_are_changed_wherever_they_stand(schema: Any, changed: Any) -> None:
    assert marked(schema) == changed


@pytest.mark.parametrize("key", sorted(VALUES))
def test_values_are_left_alone(key: str) -> None:
    assert marked({key: [{"type": "x"}, {"properties": {}}]})[key] == [{"type": "x"}, {"properties": {}}]


@pytest.mark.parametrize("key", sorted(MAPS))
def test_names_are_no_keywords(key: str) -> None:
    assert marked({key: {"enum": {}, "x": {}}})[key] == {"enum": {"seen": 1}, "x": {"seen": 1}}


def test_the_schema_itself_stays_as_it_was() -> None:
    schema = {"items": {"a": [{}]}}
    marked(schema)
    assert schema == {"items": {"a": [{}]}}
