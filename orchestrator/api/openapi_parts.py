"""Pieces that the OpenAPI document's schemas are made of (JSON Schema 2020-12)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NULL: Schema = {"type": "null"}
OPEN: Schema = {"type": "object"}
SCALAR: Schema = {"anyOf": [STRING, {"type": "number"}, BOOLEAN]}


def ref(name: str) -> Schema:
    """The schema of this name in the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def within(kind: str, limits: tuple[float, float]) -> Schema:
    return {"type": kind, "minimum": limits[0], "maximum": limits[1]}


def listed(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": low, **({} if high is None else {"maxItems": high})}


def closed(properties: dict[str, Schema], required: Iterable[str] | None = None) -> Schema:
    """An object of these properties and no others, all of them required unless it is said which."""
    needed = list(properties if required is None else required)
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def each(schema: Schema) -> Schema:
    """One, or a list of one for each of several answers."""
    return {"anyOf": [schema, listed(schema, 2)]}


def or_null(schema: Schema) -> Schema:
    if "$ref" in schema:
        return {"anyOf": [schema, NULL]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], NULL]}
    if "enum" in schema:
        schema = {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}
