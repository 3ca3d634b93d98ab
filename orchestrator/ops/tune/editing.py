"""Setting values in config.pbtxt: every other byte, comments and order included, stays as it is.

A value is named by its path: ("parameters", "slots"), ("dynamic_batching", "max_queue_delay_microseconds"),
("max_batch_size",). Its text is a number, for ("parameters", …) any text, and for lists numbers with commas between.
Whatever was edited is parsed again: unless the result is the former configuration with the wanted values and nothing
else, it is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import pbtxt
from orchestrator.ops.tune.errors import TuneError

Place = tuple[str, ...]
PARAMETERS = "parameters"
LISTS = frozenset({"preferred_batch_size"})
_CLOSERS = {"{": "}", "<": ">"}
_REST = re.compile(r"[ \t,;]*(#[^\n]*)?(?=\r?\n|$)")


@dataclass(frozen=True)
class _Field:
    """One value of a field: characters start..end-1. `whole` is a list's, with its brackets; `inner` a message's."""

    name: str
    start: int
    end: int
    whole: tuple[int, int]
    inner: tuple[_Field, ...] | None


def edited(source: str, values: Mapping[Place, str]) -> str:
    """The file with these values. Raises TuneError where it is written in a way that cannot be edited."""
    try:
        wanted = expected(pbtxt.model_config(pbtxt.parse(source)), values)
        result = source
        for path, value in values.items():
            result = _set(result, path, value)
        made = pbtxt.model_config(pbtxt.parse(result))
    except ValueError as error:
        raise _refused(f"config.pbtxt cannot be read: {error}") from error
    if made != wanted:
        raise _refused(f"config.pbtxt is written in a way in which {_named(values)} cannot be set")
    return result


def expected(config: Mapping[str, Any], values: Mapping[Place, str]) -> dict[str, Any]:
    """A configuration, as `pbtxt.model_config` has it, with these values."""
    made = copy.deepcopy(dict(config))
    for path, value in values.items():
        if path[0] == PARAMETERS:
            made.setdefault(PARAMETERS, {})[path[1]] = {"string_value": value}
            continue
        inner = made
        for name in path[:-1]:
            found = inner.setdefault(name, {})
            inner = found[0] if isinstance(found, list) else found
        inner[path[-1]] = [int(one) for one in value.split(",")] if path[-1] in LISTS else int(value)
    return made


def current(config: Mapping[str, Any], path: Place, default: str) -> str:
    """The text of a value, `default` where it is not set."""
    found: Any = config
    for name in path:
        found = found[0] if isinstance(found, list) and found else found
        found = found.get(name) if isinstance(found, dict) else None
    if path[0] == PARAMETERS:
        found = found.get("string_value") if isinstance(found, dict) else None
    if isinstance(found, list):
        return ",".join(str(one) for one in found)
    return default if found is None or found == "" else str(found)


def _set(source: str, path: Place, value: str) -> str:
    fields = _Walker(source).message(None)
    if path[0] == PARAMETERS:
        return _set_parameter(source, fields, path[1], f'"{value}"')
    text = f"[ {value.replace(',', ', ')} ]" if path[-1] in LISTS else value
    holder = None
    for name in path[:-1]:
        holder = _last(fields if holder is None else holder.inner or (), name)
        if holder is None or holder.inner is None:
            raise _refused(f"config.pbtxt has no {name}")
    found = _last(fields if holder is None else holder.inner or (), path[-1])
    if found is not None:
        start, end = found.whole if path[-1] in LISTS else (found.start, found.end)
        return source[:start] + text + source[end:]
    if holder is None:
        return _appended(source, f"{path[-1]}: {text}")
    return f"{source[: holder.start + 1]} {path[-1]}: {text}{source[holder.start + 1 :]}"


def _set_parameter(source: str, fields: Sequence[_Field], key: str, text: str) -> str:
    rows = [field for field in fields if field.name == PARAMETERS and field.inner is not None]
    own = [row for row in rows if _key(source, row) == key]
    if own:
        value = _last(own[-1].inner or (), "value")
        found = _last(value.inner or (), "string_value") if value is not None else None
        if found is None:
            raise _refused(f"config.pbtxt has a parameter {key} without a string_value")
        return source[: found.start] + text + source[found.end :]
    row = f'parameters {{ key: "{key}" value: {{ string_value: {text} }} }}'
    if not rows:
        return _appended(source, row)
    end = rows[-1].whole[1]
    rest = _REST.match(source, end)  # a comment behind the last row stays with it
    at = end if rest is None else rest.end()
    return f"{source[:at]}{_newline(source)}{row}{source[at:]}"


def _key(source: str, row: _Field) -> str:
    field = _last(row.inner or (), "key")
    if field is None:
        return ""
    return str(pbtxt.parse(f"key: {source[field.start : field.end]}")["key"][-1])


def _last(fields: Sequence[_Field], name: str) -> _Field | None:
    return next((field for field in reversed(fields) if field.name == name), None)


def _appended(source: str, line: str) -> str:
    newline = _newline(source)
    before = "" if not source or source.endswith("\n") else newline
    return f"{source}{before}{line}{newline}"


def _newline(source: str) -> str:
    return "\r\n" if "\r\n" in source else "\n"


def _named(values: Mapping[Place, str]) -> str:
    return ", ".join(path[-1] for path in values)


def _refused(message: str) -> TuneError:
    return TuneError(message, "write the values into it by hand, then `truthgpt models reload`")


class _Walker:
    """The fields of a file that `pbtxt.parse` has taken, with where they stand."""

    def __init__(self, source: str) -> None:
        self._tokens = [*pbtxt.tokens(source)]
        self._next = 0

    def message(self, closer: str | None) -> tuple[_Field, ...]:
        fields: list[_Field] = []
        while self._here.kind != "end" and not (closer and self._take(closer)):
            name = self._advance().text
            self._take(":")
            begin = self._here.start
            if self._take("["):
                found = []
                while not self._take("]"):
                    found.append(self._value(name))
                    self._take(",")
                whole = (begin, self._tokens[self._next - 1].end)
                found = found or [_Field(name, *whole, whole, None)]
                fields += [_Field(name, one.start, one.end, whole, one.inner) for one in found]
            else:
                fields.append(self._value(name))
            if not self._take(","):
                self._take(";")
        return tuple(fields)

    def _value(self, name: str) -> _Field:
        first = self._here
        inner = None
        if first.kind == "mark" and first.text in _CLOSERS:
            inner = self.message(_CLOSERS[self._advance().text])
        elif first.kind == "text":
            while self._here.kind == "text":
                self._advance()
        else:
            if first.text == "-":
                self._advance()
            self._advance()
        end = self._tokens[self._next - 1].end
        return _Field(name, first.start, end, (first.start, end), inner)

    @property
    def _here(self) -> pbtxt.Token:
        return self._tokens[self._next]

    def _advance(self) -> pbtxt.Token:
        self._next += 1
        return self._tokens[self._next - 1]

    def _take(self, mark: str) -> bool:
        found = self._here.kind == "mark" and self._here.text == mark
        self._next += found
        return found
