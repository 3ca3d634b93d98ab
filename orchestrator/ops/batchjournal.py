"""The output of a batch while it is made: OUT.partial, to which each line is appended as it is answered.

Its first line is a header with the input's fingerprint; every other line is an output line whose id ends with its
number in the input. A process that is killed at any moment leaves whole lines and at most one torn one, which is cut
off at the next start. At the end the lines are copied in the order of the input to OUT.tmp, which becomes OUT in one
rename. Memory: 8 bytes for each line of the input.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from orchestrator.ops.batchfile import BatchError, Source, encode

Row = dict[str, Any]


class Journal:
    """Made by `open`, which holds a lock until `close`. Not for several threads, but for `sync`."""

    def __init__(self, out: Path, file: IO[bytes], source: Source) -> None:
        self._out, self._file = out, file
        self.partial = Path(file.name)
        self._prefix = f"batch_req_{source.sha256[:16]}_"
        self._header = encode({"truthgpt_batch": 1, "input": {"sha256": source.sha256, "bytes": source.size}})
        self._offsets = array("Q")  # by line number; 0, where the header stands, is a line that is not done
        self._end = 0
        self._dirty = False

    @classmethod
    def open(cls, out: Path, source: Source, overwrite: bool, on_row: Callable[[Row], None]) -> Journal:
        """Start or resume; `on_row` is called with every line that is kept.

        Raises BatchError when another process writes there, when OUT exists (unless `overwrite`) or when what lies
        there belongs to another input.
        """
        partial = out.with_name(out.name + ".partial")
        if partial.exists() and partial.samefile(source.path):
            raise BatchError(f"{partial} is the input itself", "choose another --output")
        _refuse_existing(out, source, overwrite)
        journal = cls(out, _locked(partial), source)
        try:
            if out.exists() and not overwrite:  # another process finished between the look above and the lock
                if os.fstat(journal._file.fileno()).st_size == 0:
                    partial.unlink()
                _refuse_existing(out, source, overwrite)
            journal._recover(on_row)
        except BaseException:
            journal.close()
            raise
        return journal

    def id(self, number: int) -> str:
        """The id of the output line for this line of the input."""
        return f"{self._prefix}{number}"

    def done(self, number: int) -> bool:
        return number < len(self._offsets) and self._offsets[number] > 0

    def append(self, number: int, row: Row) -> None:
        """Write one line, at once. Raises BatchError where it cannot be written; what was there before stays whole."""
        data = encode(row)
        try:
            written = os.write(self._file.fileno(), data)
            while written < len(data):
                written += os.write(self._file.fileno(), data[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._end)
            raise self._unwritable(self.partial, error) from error
        self._mark(number, self._end)
        self._end += len(data)
        self._dirty = True

    def sync(self) -> None:
        """Have what was appended survive a power failure."""
        if self._dirty:
            self._dirty = False
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Put OUT in place, in the order of the input, and remove the partial file. Raises BatchError."""
        temporary = self._out.with_name(self._out.name + ".tmp")
        try:
            # Read through a file of its own: the buffer of the one that was recovered may hold what was cut off.
            with temporary.open("wb") as target, self.partial.open("rb") as done:
                for offset in self._offsets:
                    if offset:
                        done.seek(offset)
                        target.write(done.readline())
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, self._out)
            self.partial.unlink()
            folder = os.open(self._out.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise self._unwritable(self._out, error) from error

    def close(self) -> None:
        self._file.close()

    def _recover(self, on_row: Callable[[Row], None]) -> None:
        first = self._file.readline()
        if first == self._header:
            self._end = len(first)
            while (line := self._file.readline()).endswith(b"\n") and (row := self._own(line)) is not None:
                self._mark(int(row["id"].removeprefix(self._prefix)), self._end)
                self._end += len(line)
                on_row(row)
        elif not self._header.startswith(first):
            self._refuse(first)
        os.ftruncate(self._file.fileno(), self._end)
        if not self._end:
            os.write(self._file.fileno(), self._header)
            self._end = len(self._header)

    def _own(self, line: bytes) -> Row | None:
        """The row, None where this is not a line that we wrote (a power failure can leave zeros)."""
        try:
            row = json.loads(line)
        except ValueError:
            return None
        id = str(row.get("id")) if isinstance(row, dict) else ""
        number = id.removeprefix(self._prefix)
        good = id.startswith(self._prefix) and number.isdecimal() and not self.done(int(number))
        return row if good else None

    def _mark(self, number: int, offset: int) -> None:
        if number >= len(self._offsets):
            self._offsets.extend([0] * (number + 1 - len(self._offsets)))
        self._offsets[number] = offset

    def _refuse(self, first: bytes) -> None:
        with contextlib.suppress(ValueError):
            header = json.loads(first)
            if isinstance(header, dict) and "truthgpt_batch" in header:
                hint = f"give the input that it was begun with, or remove {self.partial} to begin anew"
                raise BatchError(f"{self.partial} was begun with another input", hint)
        raise BatchError(f"{self.partial} is not a batch's output", "choose another --output")

    def _unwritable(self, path: Path, error: OSError) -> BatchError:
        hint = f"mend that and run the same command again; {self.partial} keeps what is done"
        return BatchError(f"{path} cannot be written: {error.strerror}", hint)


def _refuse_existing(out: Path, source: Source, overwrite: bool) -> None:
    if out.exists() and out.samefile(source.path):
        raise BatchError(f"{out} is the input itself", "choose another --output")
    if out.exists() and not (overwrite and out.is_file()):
        raise BatchError(f"{out} exists already", "choose another --output, or give --overwrite to replace a file")


def _locked(path: Path) -> IO[bytes]:
    """The file, opened to be read and appended to, that no other process has."""
    while True:
        file = path.open("a+b", buffering=1 << 16)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.seek(0)
                return file
        except BlockingIOError as error:
            file.close()
            raise BatchError(f"another process is writing {path}", "wait for it, or choose another --output") from error
        file.close()  # it was removed while it was opened, by a batch that came to its end
