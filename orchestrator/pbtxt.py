"""Reads protobuf's text format, as config.pbtxt is written in, without a schema.

https://protobuf.dev/reference/protobuf/textformat-spec/. A message becomes a dict from field name to the list of its
values, in order: str for strings (adjacent ones joined) and names such as TYPE_BOOL (as `Name`), bool, int, float, or a
dict for a message. Extensions, `Any` and byte escapes outside UTF-8 are refused: Triton's ModelConfig needs none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_DEPTH = 32

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>-?(?:0[xX][0-9a-fA-F]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?))(?![\w.])
    |(?P<name>[A-Za-z_]\w*)
    |(?P<mark>[-{}<>\[\]:,;])""",
    re.VERBOSE | re.ASCII,
)
_ESCAPES = {"n": 10, "t": 9, "r": 13, "a": 7, "b": 8, "f": 12, "v": 11, "\\": 92, "'": 39, '"': 34, "?": 63}
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_CLOSERS = {"{": "}", "<": ">"}

Message = dict[str, list[Any]]


class Name(str):
    """An enum's value or another bare word, as apart from a quoted string."""

    __slots__ = ()


class Token(NamedTuple):
    """What a file consists of beside space and comments. `kind` is text, number, name or mark, and "end" behind all;
    it begins `start` characters into the file.
    """

    kind: str
    text: str
    line: int
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def tokens(source: str) -> Iterator[Token]:
    """The tokens of a file. Raises ValueError with the line of what is none."""
    position, line = 0, 1
    while position < len(source):
        match = _TOKEN.match(source, position)
        if match is None:
            raise ValueError(f"line {line}: {source[position : position + 10].splitlines()[0]!r} is not understood")
        if match.lastgroup != "space":
            yield Token(str(match.lastgroup), match[0], line, position)
        line += match[0].count("\n")
        position = match.end()
    yield Token("end", "", line, position)


def parse(source: str) -> Message:
    """The message of a file. Raises ValueError with the line of what is wrong."""
    return _Parser(source).message(None, 0)


class _Parser:
    def __init__(self, source: str) -> None:
        self._tokens = [*tokens(source)]
        self._next = 0

    def message(self, closer: str | None, depth: int) -> Message:
        if depth > MAX_DEPTH:
            raise self._error(f"messages are nested more than {MAX_DEPTH} deep")
        fields: Message = {}
        while not (self._take(closer) if closer else self._kind == "end"):
            if self._kind != "name":
                raise self._error("expected a field's name")
            name = self._advance()
            colon = self._take(":")
            values = fields.setdefault(name, [])
            if self._take("["):
                values += self._list(depth)
            elif self._text in _CLOSERS:
                values.append(self.message(_CLOSERS[self._advance()], depth + 1))
            elif colon:
                values.append(self._scalar())
            else:
                raise self._error("expected ':' or a message")
            if not self._take(","):
                self._take(";")
        return fields

    def _list(self, depth: int) -> list[Any]:
        values: list[Any] = []
        while not self._take("]"):
            if values:
                self._expect(",")
                # Triton's parser is strict here as well: no comma after the last element.
            is_message = self._text in _CLOSERS
            values.append(self.message(_CLOSERS[self._advance()], depth + 1) if is_message else self._scalar())
        return values

    def _scalar(self) -> Any:
        if self._kind == "text":
            parts = []
            while self._kind == "text":
                line = self._tokens[self._next][2]
                parts.append(_unescape(self._advance()[1:-1], line))
            return b"".join(parts).decode("utf-8")
        negative = self._take("-")
        if self._kind == "number":
            return _number(self._advance(), negative)
        if self._kind != "name":
            raise self._error("expected a value")
        word = self._advance()
        if word.lower() in ("inf", "infinity", "nan"):
            return -float(word) if negative else float(word)
        if negative:
            raise self._error("expected a number after '-'")
        return {"true": True, "True": True, "t": True, "false": False, "False": False, "f": False}.get(word, Name(word))

    @property
    def _kind(self) -> str:
        return self._tokens[self._next].kind

    @property
    def _text(self) -> str:
        """What stands here if it is a mark, else an empty text: a quoted "{" opens nothing."""
        token = self._tokens[self._next]
        return token.text if token.kind == "mark" else ""

    def _advance(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1].text

    def _take(self, mark: str) -> bool:
        found = self._text == mark
        self._next += found
        return found

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise self._error(f"expected {mark!r}")

    def _error(self, what: str) -> ValueError:
        kind, text, line, _ = self._tokens[self._next]
        return ValueError(f"line {line}: {what}, found {'the end of the file' if kind == 'end' else text[:20]!r}")


def _number(text: str, negative: bool) -> int | float:
    sign = -1 if negative else 1
    if text.lower().lstrip("-").startswith("0x"):
        return sign * int(text, 16)
    if re.fullmatch(r"-?[0-9]+", text):
        # a leading zero means octal in this format
        return sign * int(text, 8 if re.fullmatch(r"-?0[0-7]+", text) else 10)
    return sign * float(text.rstrip("fF"))


def _unescape(text: str, line: int) -> bytes:
    def byte(match: re.Match[str]) -> str:
        octal, hexadecimal, short, long, letter = match.groups()
        if octal or hexadecimal:
            value = int(octal, 8) if octal else int(hexadecimal, 16)
            # a byte, carried through str as a surrogate until everything is bytes
            return bytes([value & 0xFF]).decode("utf-8", "surrogateescape")
        if short or long:
            return chr(int(short or long, 16))
        if letter not in _ESCAPES:
            raise ValueError(f"line {line}: unknown escape \\{letter}")
        return chr(_ESCAPES[letter])

    try:
        raw = _ESCAPE.sub(byte, text).encode("utf-8", "surrogateescape")
        raw.decode("utf-8")
    except (UnicodeError, OverflowError) as error:
        raise ValueError(f"line {line}: the string is not UTF-8 text") from error
    return raw


# The text format writes a list of one as it writes a single value, and a map as rows of key and value: only the schema
# tells them apart. These are the names of Triton's ModelConfig
# (https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto).
_REPEATED = frozenset(
    "input output batch_input batch_output instance_group model_warmup dims shape dim gpus profile secondary_devices "
    "resources target_name source_input versions preferred_batch_size control_input control state initial_state "
    "int32_false_true fp32_false_true bool_false_true step graph_spec gpu_execution_accelerator "
    "cpu_execution_accelerator op_library_filename agents metric_control buckets".split()
)
_MAPS = frozenset(
    "cc_model_filenames metric_tags parameters inputs input_map output_map priority_queue_policy".split()
)
_BOOLS = frozenset(
    "decoupled optional is_shape_tensor allow_ragged_batch is_non_linear_format_io passive global graphs "
    "busy_wait_events output_copy_stream eager_batching enable allow_timeout_override preserve_ordering "
    "iterative_sequence zero_data random_data use_same_buffer_for_input_output use_growable_memory".split()
)
_SHAPES = ("graph_spec", "graph_lower_bound")  # in these `input` is a map


def model_config(message: Message, within: str = "") -> dict[str, Any]:
    """A parsed config.pbtxt as the JSON object that Triton's `load` takes for `parameters.config`."""
    return {name: _field(name, values, within) for name, values in message.items() if values}


def _field(name: str, values: list[Any], within: str) -> Any:
    if name in _MAPS or (name == "input" and within in _SHAPES):
        rows = [row for row in values if isinstance(row, dict)]
        return {str(_last(row, "key", "")): _value(name, _last(row, "value", "")) for row in rows}
    converted = [_value(name, value) for value in values]
    return converted if name in _REPEATED else converted[-1]


def _value(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return model_config(value, name)
    return bool(value) if name in _BOOLS else value


def _last(row: Message, key: str, default: object) -> Any:
    values = row.get(key)
    return values[-1] if values else default
