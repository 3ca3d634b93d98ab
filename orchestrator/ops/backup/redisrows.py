"""The lines that an export of Redis is made of: see redisdata.py. What is written here can be read here.

A line is bounded, so that whoever reads one needs little memory, whoever has written it: a key that is larger is spread
over several lines, of which all but the last have `"more": true`.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from orchestrator.ops.backup.errors import BackupError, Damaged, Newer

FORMAT = 1
LINE_BYTES = 4 << 20  # that a line has at most
PART_BYTES = 1 << 20  # of a value in base64 in one line, unless a single element is larger
OURS = "truthgpt:"
LONGEST_MS = (1 << 53) - 1
Row = dict[str, Any]
_NAMES = {"key", "type", "value", "ttl_ms", "more"}


def write_head(file: BinaryIO, at_ms: int) -> None:
    """The first line. Raises OSError."""
    _write(file, {"format": FORMAT, "at_ms": at_ms})


def write(file: BinaryIO, row: Row) -> None:
    """A key, in as many lines as it needs. Raises BackupError for one that cannot be written, and OSError."""
    row = {**row, "ttl_ms": min(row["ttl_ms"], LONGEST_MS)}
    parts = list(_parts(row["value"]))
    for part in parts[:-1]:
        _write(file, {**row, "value": part, "more": True})
    _write(file, {**row, "value": parts[-1]})


def rows(file: BinaryIO) -> Iterator[Row]:
    """The lines, `ttl_ms` as it is now; what has ended meanwhile is left out.

    `first` and `last` tell whether a key begins and ends with a line, `bytes` how long the line is. Raises Damaged and
    Newer.
    """
    head, _ = _parsed(file)
    if head is None or type(head.get("format")) is not int or type(head.get("at_ms")) is not int:
        raise Damaged("its Redis data have a form that is none")
    if head["format"] != FORMAT:
        raise Newer("its Redis data have another form")
    passed_ms = max(0, int(time.time() * 1000) - head["at_ms"])
    open_: tuple[Any, ...] | None = None  # the key that goes on with the next line
    while True:
        row, size = _parsed(file)
        if row is None:
            break
        _check(row)
        what = (row["key"], row["type"], row["ttl_ms"])
        if open_ is not None and open_ != what:
            raise Damaged("its Redis data have a key without its end")
        row["first"], row["last"], row["bytes"] = open_ is None, not row.get("more", False), size
        open_ = None if row["last"] else what
        if row["ttl_ms"] >= 0:
            row["ttl_ms"] -= passed_ms
            if row["ttl_ms"] <= 0:
                continue
        yield row
    if open_ is not None:
        raise Damaged("its Redis data have a key without its end")


def b64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def text_of(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def name_of(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _parts(value: Any) -> Iterator[Any]:
    """A value in pieces of about PART_BYTES, at least one."""
    if isinstance(value, str):
        for at in range(0, max(1, len(value)), PART_BYTES):  # a multiple of four: each piece is base64 by itself
            yield value[at : at + PART_BYTES]
        return
    part: list[Any] = []
    size = 0
    for item in value or ():
        weight = 8 + (len(item) if isinstance(item, str) else sum(map(len, item)))
        if part and size + weight > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += weight
    yield part if value is not None else None


def _write(file: BinaryIO, row: Row) -> None:
    line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
    if len(line) > LINE_BYTES:
        what = f"Redis's key {ascii(row['key'])[:200]} has an element of {len(line):,} bytes"
        raise BackupError(f"{what}, which no key of TruthGPT has", "remove it")
    file.write(line)


def _parsed(file: BinaryIO) -> tuple[Row | None, int]:
    line = file.readline(LINE_BYTES + 1)
    if not line:
        return None, 0
    if len(line) > LINE_BYTES or not line.endswith(b"\n"):
        raise Damaged("its Redis data have a line that is too long, or no end")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Damaged("its Redis data cannot be read") from error
    if not isinstance(row, dict):
        raise Damaged("its Redis data cannot be read")
    return row, len(line)


def _check(row: Row) -> None:
    """Raises Damaged unless a row is one that `write` writes."""
    try:
        kind, value = row["type"], row["value"]
        good = row["key"].startswith(OURS) and type(row["ttl_ms"]) is int and -1 <= row["ttl_ms"] <= LONGEST_MS
        good = good and row.get("more", False) in (False, True) and row.keys() <= _NAMES
        name_of(row["key"])
        if kind == "string":
            _decoded(value)
        elif kind == "list":
            for item in value:
                _decoded(item)
        elif kind == "hash":
            for name, item in value:
                _decoded(name), _decoded(item)
        elif kind == "zset":
            for item, score in value:
                _decoded(item)
                if not isinstance(score, str) or (number := float(score)) != number:
                    raise ValueError
        else:
            good = good and kind == "none" and value is None and not row.get("more")
        if not good or (isinstance(value, list) and not value):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged("its Redis data have a key that is none") from error


def _decoded(value: object) -> bytes:
    if not isinstance(value, str):
        raise TypeError
    return base64.b64decode(value, validate=True)
