"""Reads a backup from its first byte to its last and believes nothing of it. Constant memory but for the names.

Checked are the form of every member, its name, that its folder came before it and its name only once, its size against
what is left of the file, every byte against the line at the end, and the manifest against all that was found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from orchestrator.ops.backup.errors import BackupError, Damaged
from orchestrator.ops.backup.sealing import BUFFER, MAGIC, Source, decrypted
from orchestrator.ops.backup.tarform import (
    BLOCK,
    END,
    FOOTER_BYTES,
    MANIFEST,
    MANIFEST_BYTES,
    MOST_MEMBERS,
    TAIL_BYTES,
    TREES,
    Manifest,
    Member,
    padding,
    parse,
    read_footer,
)

CHUNK = 1 << 20
Progress = Callable[[int, int], None]  # bytes done, and of how many
REDIS = "redis/keys.jsonl"
# First names below a tree; of the models every one but hidden ones.
ALLOWED = {
    "settings": {"settings.json", "truthgpt.toml"},
    "redis": {"keys.jsonl"},
    "home": {"audit", "audit.key", "metrics", "models.json", "alerts.json"},
}


class Sink(Protocol):
    """Where members go as they are read, before anybody knows whether the backup is good."""

    def folder(self, member: Member) -> None: ...

    def file(self, member: Member, chunks: Iterator[bytes]) -> None:
        """Takes all chunks."""


@dataclass(frozen=True)
class Report:
    """A backup every byte of which is right. `bytes` are the file's, `sha256` of the archive in it."""

    path: Path
    encrypted: bool
    bytes: int
    sha256: str
    manifest: Manifest


class Nowhere:
    """Reads and keeps nothing."""

    def folder(self, member: Member) -> None:
        """Nothing to do."""

    def file(self, member: Member, chunks: Iterator[bytes]) -> None:
        for _ in chunks:
            pass


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A backup's file, to be read as often as needed. Raises OSError or Damaged."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would be waited for
    with os.fdopen(handle, "rb", BUFFER) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Damaged(f"{path} is no file")
        yield file


def read(path: Path, file: BinaryIO, key: str | None, sink: Sink, progress: Progress) -> Report:
    """Check all of a backup, and give it to `sink` on the way. Raises BackupError (Damaged) and OSError."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    encrypted = file.read(len(MAGIC)) == MAGIC
    file.seek(0)
    try:
        with contextlib.ExitStack() as stack:
            source: Source = file
            if encrypted:
                if key is None:
                    raise BackupError("it is encrypted", "set TRUTHGPT_BACKUP_KEY to the key it was made with")
                source = stack.enter_context(decrypted(file, key))
            else:
                _check_end(file, size)
            reader = _Reader(source, size, sink, progress)
            manifest = reader.all()
    except BackupError as error:
        error.args = (f"{path}: {error}",)
        raise
    return Report(path, encrypted, size, reader.sha256, manifest)


def _check_end(file: BinaryIO, size: int) -> None:
    """What costs nothing first: a file that was cut off or has grown is not read at all."""
    file.seek(max(0, size - TAIL_BYTES))
    found, _ = read_footer(file.read(TAIL_BYTES))
    if found != size - FOOTER_BYTES:
        raise Damaged(f"it has {size} bytes instead of {found + FOOTER_BYTES}")
    file.seek(0)


class _Reader:
    def __init__(self, source: Source, size: int, sink: Sink, progress: Progress) -> None:
        self._source, self._size, self._sink, self._progress = source, size, sink, progress
        self._hash, self._bytes = hashlib.sha256(), 0
        self._members: list[Member] = []
        self._names: set[str] = set()
        self._folders: set[str] = set()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def all(self) -> Manifest:
        while True:
            member = parse(self._take(BLOCK))
            if member.bytes > self._size - self._bytes:
                raise Damaged(f"{ascii(member.name)} has more bytes than the whole file")
            if member.name == MANIFEST and not member.folder:
                break
            self._member(member)
        manifest = self._manifest(member)
        if self._take(len(END)) != END:
            raise Damaged("there is something behind its manifest")
        if read_footer(self._exactly(FOOTER_BYTES)) != (self._bytes, self.sha256):
            raise Damaged("it was changed: its checksum is another")
        if self._source.read(1):
            raise Damaged("there is something behind its end")
        self._progress(self._size, self._size)
        return manifest

    def _member(self, member: Member) -> None:
        self._check_place(member)
        if member.folder:
            self._folders.add(member.name)
            self._sink.folder(member)
        else:
            hash = hashlib.sha256()
            chunks = self._data(member, hash.update)
            self._sink.file(member, chunks)
            for _ in chunks:  # what the sink did not want
                pass
            member = replace(member, sha256=hash.hexdigest())
        self._members.append(member)

    def _check_place(self, member: Member) -> None:
        name = member.name
        tree, _, rest = name.partition("/")
        parent = name.rpartition("/")[0]
        if name in self._names:
            raise Damaged(f"{ascii(name)} is in it twice")
        if len(self._names) >= MOST_MEMBERS:
            raise Damaged(f"it has more than {MOST_MEMBERS} members")
        if not (member.folder if not rest else parent in self._folders):
            raise Damaged(f"{ascii(name)} is in no folder of it")
        first = rest.partition("/")[0]
        if first and (first not in ALLOWED[tree] if tree in ALLOWED else first.startswith(".")):
            raise Damaged(f"{ascii(name)} is nothing that a backup has")
        self._names.add(name)

    def _data(self, member: Member, update: Callable[[bytes], None]) -> Iterator[bytes]:
        left = member.bytes
        while left:
            chunk = self._take(min(CHUNK, left))
            left -= len(chunk)
            update(chunk)
            yield chunk
        pad = padding(member.bytes)
        if self._take(len(pad)) != pad:
            raise Damaged("there is something between its members")

    def _manifest(self, member: Member) -> Manifest:
        if member.bytes > MANIFEST_BYTES:
            raise Damaged("its manifest is too large")
        data = b"".join(self._data(member, lambda chunk: None))
        manifest = Manifest.decode(data, self._members)
        trees = self._folders & set(TREES)
        whole = set(manifest.origins) == trees and ("redis" in trees) == (REDIS in self._names)
        if not whole:
            raise Damaged("its manifest says something else than what is in it")
        return manifest

    def _take(self, size: int) -> bytes:
        data = self._exactly(size)
        self._hash.update(data)
        self._bytes += size
        self._progress(self._bytes, self._size)
        return data

    def _exactly(self, size: int) -> bytes:
        data = self._source.read(size) if size else b""
        if len(data) < size:
            raise Damaged("it ends too early")
        return data
