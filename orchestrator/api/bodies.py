"""A request's body once it is read: decompressed within the size limit, and parsed as a JSON object."""

from __future__ import annotations

import json
import zlib
from typing import Any

import orjson

from orchestrator.errors import InvalidRequest, PayloadTooLarge, Text

MAX_DEPTH = 64
CODINGS = ("gzip", "deflate")
_MAX_MEMBERS = 1000
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's window bits for each container


def decompress(body: bytes, coding: str, limit_bytes: int) -> bytes:
    """A gzip (RFC 1952) or deflate (RFC 9110: zlib's container; raw, too, as some clients send it) body.

    Never holds more than `limit_bytes` + 1 of the result. Raises PayloadTooLarge, or InvalidRequest when the body is
    not of this coding or is cut off.
    """
    if coding == "gzip":
        kind = _GZIP
    else:
        kind = _ZLIB if len(body) > 1 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0 else _RAW
    parts, size = [], 0
    try:
        for _ in range(_MAX_MEMBERS):  # a gzip body may be several, one after another
            inflater = zlib.decompressobj(kind)
            part = inflater.decompress(body, limit_bytes + 1 - size)
            parts.append(part)
            size += len(part)
            if size > limit_bytes:
                raise PayloadTooLarge(limit_bytes)
            body = inflater.unused_data
            if not inflater.eof or (body and coding != "gzip"):
                break
            if not body:
                return b"".join(parts)
    except zlib.error as error:
        raise _not_of(coding) from error
    raise _not_of(coding)


def _not_of(coding: str) -> InvalidRequest:
    return InvalidRequest(
        Text(f"The body is no complete {coding} data.", f"El cuerpo no contiene datos {coding} completos.")
    )


def json_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object (RFC 8259) of UTF-8 text. Raises InvalidRequest."""
    value = json_value(body, Text("The body is not valid JSON.", "El cuerpo no es JSON válido."))
    if not isinstance(value, dict):
        raise InvalidRequest(Text("The body must be a JSON object.", "El cuerpo debe ser un objeto JSON."))
    return value


def json_value(data: bytes, not_json: Text, param: str | None = None) -> Any:
    """Any JSON value without NaN, lone surrogates and endless nesting. Raises InvalidRequest."""
    try:
        value = orjson.loads(data)
    except ValueError:  # why, is found out by one that is slower, and takes numbers of any size
        value = _slowly(data, not_json, param)
    # what has no more brackets than this, as nearly all bodies, cannot be too deep
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH:
        _check_depth(value, param)
    return value


def _slowly(data: bytes, not_json: Text, param: str | None) -> Any:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in data:
            # A lone surrogate is legal in JSON's grammar and is no text: it could not be written out as UTF-8.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise InvalidRequest(
            Text("The body is not valid UTF-8 text.", "El cuerpo no es texto UTF-8 válido."), param
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(not_json, param) from error
    return value


def _check_depth(value: object, param: str | None) -> None:
    if _deeper_than(value, MAX_DEPTH):
        raise InvalidRequest(
            Text(
                f"The body is nested more than {MAX_DEPTH} levels deep.",
                f"El cuerpo tiene más de {MAX_DEPTH} niveles de anidamiento.",
            ),
            param,
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _deeper_than(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
