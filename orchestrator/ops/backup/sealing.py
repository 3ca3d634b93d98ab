"""Encryption of a stream, in constant memory: the age format (https://age-encryption.org/v1), by pyrage.

`settings.backup_key` is an age identity; who has it reads, and writes by its public recipient. The library pulls what
it works on and so has a thread, a pipe away from whoever writes or reads here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from orchestrator.ops.backup.errors import BackupError, Damaged

MAGIC = b"age-encryption.org/v1\n"
BUFFER = 1 << 18


class Source(Protocol):
    """Where a backup is read from, in the clear."""

    def read(self, size: int) -> bytes:
        """So many bytes; fewer only at the end. Raises BackupError or OSError."""


def new_key() -> tuple[str, str]:
    """A new identity, which is the secret, and its recipient."""
    import pyrage

    identity = pyrage.x25519.Identity.generate()
    return str(identity), str(identity.to_public())


def _identity(key: str) -> Any:
    import pyrage

    try:
        return pyrage.x25519.Identity.from_str(key)
    except pyrage.IdentityError as error:
        hint = "`truthgpt backup keygen` makes one; TRUTHGPT_BACKUP_KEY gives it"
        raise BackupError("the key of the backups is no age identity", hint) from error


class _Tapped:
    """A stream for the library, which keeps what it raises: the library makes another error of it."""

    def __init__(self, read: Callable[[int], bytes], write: Callable[[bytes], None]) -> None:
        self._read, self._write = read, write
        self.error: BaseException | None = None

    def read(self, size: int) -> bytes:
        return bytes(self._kept(self._read, size))

    def write(self, data: bytes) -> int:
        self._kept(self._write, data)
        return len(data)

    def flush(self) -> None:
        """What is written is written."""

    def _kept(self, function: Callable[[Any], Any], argument: object) -> Any:
        try:
            return function(argument)
        except BaseException as error:
            self.error = error
            raise


@contextlib.contextmanager
def encrypted(write: Callable[[bytes], None], key: str) -> Iterator[Callable[[bytes], None]]:
    """What to give data to, so that `write` gets it encrypted; all of it once this is left.

    Raises what `write` does, and BackupError for a key that is none.
    """
    import pyrage

    recipient = _identity(key).to_public()
    reading, writing = os.pipe()
    pulled = os.fdopen(reading, "rb", BUFFER)
    tapped, failures = _Tapped(pulled.read, write), list[BaseException]()

    def work() -> None:
        try:
            pyrage.encrypt_io(tapped, tapped, [recipient])
        except BaseException as error:  # handed to whoever waits for this thread
            failures.append(tapped.error or error)
        finally:
            pulled.close()

    thread = threading.Thread(target=work, name="age", daemon=True)
    thread.start()
    try:
        yield lambda data: _write_all(writing, data)
    except BrokenPipeError:  # the thread has given up: its reason is the better one
        os.close(writing)
        thread.join()
        if failures:
            raise failures[0] from None
        raise
    except BaseException:
        os.close(writing)
        thread.join()
        raise
    os.close(writing)
    thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def decrypted(file: BinaryIO, key: str) -> Iterator[Source]:
    """The clear text of a file, from where it stands. What comes from it may still be followed by Damaged.

    Raises BackupError for a key that is none, or another's.
    """
    import pyrage

    identity = _identity(key)
    reading, writing = os.pipe()
    tapped, failures = _Tapped(file.read, lambda data: _write_all(writing, data)), list[BaseException]()

    def work() -> None:
        try:
            pyrage.decrypt_io(tapped, tapped, [identity])
        except BaseException as error:  # handed to whoever reads
            failures.append(tapped.error or _translated(error))
        finally:
            os.close(writing)

    thread = threading.Thread(target=work, name="age", daemon=True)
    with os.fdopen(reading, "rb", BUFFER) as pulled:
        thread.start()
        try:
            yield _Pulled(pulled, thread, failures)
        finally:
            pulled.close()  # a thread that still writes ends by it
            thread.join()


class _Pulled:
    def __init__(self, pulled: BinaryIO, thread: threading.Thread, failures: list[BaseException]) -> None:
        self._pulled, self._thread, self._failures = pulled, thread, failures

    def read(self, size: int) -> bytes:
        data = self._pulled.read(size)
        if len(data) < size:
            self._thread.join()
            if self._failures:
                raise self._failures[0]
        return data


def _translated(error: BaseException) -> BaseException:
    if "No matching keys" in str(error):
        return BackupError("it was encrypted with another key", "set TRUTHGPT_BACKUP_KEY to the one it was made with")
    return Damaged("it cannot be decrypted: a part of it is missing or was changed")


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
