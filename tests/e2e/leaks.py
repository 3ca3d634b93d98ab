"""Looking for a text wherever a stack leaves something behind, in any form it may have taken on the way."""

from __future__ import annotations

import base64
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Place = tuple[str, bytes]  # a name for people, and what stands there


def forms(mark: str) -> list[bytes]:
    """The bytes that a mark of ASCII letters and digits shows by: plain (which is how JSON and URLs write it, too), as
    UTF-16, hexadecimal, and base64 at each of the three offsets that it may begin at.
    """
    plain = mark.encode()
    inner = [base64.b64encode(bytes(offset) + plain)[4 if offset else 0 :].rstrip(b"=")[:-1] for offset in range(3)]
    return [plain, mark.encode("utf-16-le"), mark.encode("utf-16-be"), plain.hex().encode(), *inner]


def _unpacked(content: bytes) -> Iterator[bytes]:
    """What a gzip file holds, and what is deflated behind the first line of a cached answer."""
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    for start in (0, content.find(b"\n") + 1):
        for window in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
            try:
                yield zlib.decompressobj(window).decompress(content[start:])
            except zlib.error:  # it was not packed in this way
                continue


def files(folder: Path) -> Iterator[Place]:
    """Every file below a folder; sockets and links are left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path.relative_to(folder)), path.read_bytes()


def everything(client: Any) -> Iterator[Place]:
    """Every key of a Redis, by redis-py, and all that is stored below it. Raises ValueError for an unknown type."""
    for key in client.scan_iter(count=1000):
        kind, name = client.type(key).decode(), key.decode("utf-8", "replace")
        yield "redis key", key
        if kind == "string":
            parts = [client.get(key) or b""]
        elif kind == "hash":
            parts = [part for row in client.hgetall(key).items() for part in row]
        elif kind == "list":
            parts = client.lrange(key, 0, -1)
        elif kind == "set":
            parts = list(client.smembers(key))
        elif kind == "zset":
            parts = client.zrange(key, 0, -1)
        elif kind == "stream":
            parts = [part for _, row in client.xrange(key) for pair in row.items() for part in pair]
        elif kind == "none":  # it has expired meanwhile
            parts = []
        else:
            raise ValueError(f"{name} is a {kind}")
        for part in parts:
            yield f"redis {name}", part


def found(marks: Iterable[str], places: Iterable[Place]) -> set[tuple[str, str]]:
    """Which mark stands where, in whatever case, plain or packed."""
    wanted = {mark: [form.lower() for form in forms(mark)] for mark in marks}
    seen = set()
    for name, content in places:
        for each in {content, *_unpacked(content)}:
            lower = each.lower()
            seen |= {(mark, name) for mark, shapes in wanted.items() if any(shape in lower for shape in shapes)}
    return seen
