"""Writes a backup: members one after the other, in constant memory but for the manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from orchestrator.ops.backup.errors import BackupError, Changed
from orchestrator.ops.backup.tarform import (
    END,
    MANIFEST,
    MANIFEST_BYTES,
    MOST_MEMBERS,
    Manifest,
    Member,
    check_name,
    footer,
    header,
    padding,
)

CHUNK = 1 << 20


class Output:
    """A file that is written from its beginning, with its size and SHA-256 so far. Raises OSError."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.bytes = 0
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.write(self._handle, view)
            self.hash.update(view[:done])
            self.bytes += done
            view = view[done:]


class Writer:
    """`write` gets the archive; `progress` is told how many bytes of data more there are. The members are noted in
    `manifest`.
    """

    def __init__(self, write: Callable[[bytes], None], manifest: Manifest, progress: Callable[[int], None]) -> None:
        self._write, self.manifest, self._progress = write, manifest, progress
        self._hash, self._bytes = hashlib.sha256(), 0
        self._names: set[str] = set()

    def folder(self, name: str, mode: int, mtime: int) -> None:
        self._begin(Member(name, 0, mode, mtime))
        self.manifest.members.append(Member(name, 0, mode, mtime))

    def file(self, name: str, size: int, mode: int, mtime: int, data: BinaryIO) -> None:
        """A file's first `size` bytes. Raises Changed where it has fewer by now."""
        member = Member(name, size, mode, mtime, "")
        self._begin(member)
        hash, left = hashlib.sha256(), size
        while left:
            chunk = data.read(min(CHUNK, left))
            if not chunk:
                raise Changed(name)
            hash.update(chunk)
            self._put(chunk)
            left -= len(chunk)
            self._progress(len(chunk))
        self._put(padding(size))
        self.manifest.members.append(replace(member, sha256=hash.hexdigest()))

    def finish(self) -> None:
        """The manifest and the end."""
        data = self.manifest.encode()
        if len(data) > MANIFEST_BYTES:
            raise too_many()
        self._put(header(Member(MANIFEST, len(data), 0o600, int(self.manifest.created), "")))
        for part in (data, padding(len(data)), END):
            self._put(part)
        self._write(footer(self._bytes, self._hash.hexdigest()))

    def _begin(self, member: Member) -> None:
        check_name(member.name)
        if member.name in self._names:
            raise BackupError(f"{ascii(member.name)} is there twice", "rename one of them")
        if len(self._names) >= MOST_MEMBERS:
            raise too_many()
        self._names.add(member.name)
        self._put(header(member))

    def _put(self, data: bytes) -> None:
        self._hash.update(data)
        self._bytes += len(data)
        self._write(data)


def too_many() -> BackupError:
    hint = "--no-models leaves the model repository out, which is most of them"
    return BackupError(f"there are more than {MOST_MEMBERS} files and folders", hint)
