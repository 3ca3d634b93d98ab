"""Another config.pbtxt in the place of the one that is there, and the served model reloaded: both or neither.

What is about to happen is written down first, in home/tune/pending.json, and marked as done when the model answers with
its new settings. Whoever finds a note that is not done puts the former file back, and has it served again: this process
when something fails or Ctrl-C comes; the guard (guard.py) when this process is killed; the next `truthgpt tune` or
`truthgpt up` when both were. A note that is done only lacks its record for `--undo`, which is then made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import TruthGPTError
from orchestrator.local.modelset import Busy
from orchestrator.local.swap import sync_folder
from orchestrator.models import ModelsError
from orchestrator.ops import auditing
from orchestrator.ops.modelserver import ControlError
from orchestrator.ops.tune import guard, undoing
from orchestrator.ops.tune.errors import TuneError
from orchestrator.ops.tune.served import served
from orchestrator.settings import Settings

NOTE = "pending.json"
WRITING = ".config.pbtxt-"  # begins the name of one that is being written
POLL_S = 0.1
_NOT_RELOADED = (ControlError, TruthGPTError, ModelsError, Busy, OSError)

Say = Callable[[str], None]


class Reloads(Protocol):
    """Whoever serves the model. See served.Served."""

    def reload(self, say: Say) -> object: ...


Find = Callable[[Settings, str], Reloads | None]


class InUse(TuneError):
    """Another process is tuning in this home."""


@dataclass(frozen=True)
class Change:
    """The config.pbtxt of a model, its links resolved, and what is to stand in it.

    `undoes`: the record of the change that this undoes.
    """

    model: str
    path: Path
    before: str
    after: str
    undoes: Path | None = None


def read(path: Path) -> str:
    """A config.pbtxt, byte for byte. Raises TuneError."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuneError(f"{path} cannot be read: {error}", "check its owner, or export the model again") from error


def require_writable(path: Path) -> None:
    """Raises TuneError where it is clear beforehand that config.pbtxt could not be replaced."""
    folder = path.resolve().parent
    try:
        read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    if read_only or not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(path, "read-only file system" if read_only else "permission denied")


@contextlib.contextmanager
def held(home: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of home/tune: one tuning of a home at a time. Raises InUse when another one has it."""
    folder = home.resolve() / "tune"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise TuneError(f"{folder} cannot be written: {error.strerror}", "choose another home with --home") from error
    with file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise InUse(f"another tuning runs from {home}", "wait until it has ended") from error
                time.sleep(POLL_S)
        yield


def apply(settings: Settings, change: Change, say: Say = lambda text: None, find: Find = served) -> bool:
    """Write the file and have the running stack take it up; whether one has: none may run, or not serve the model.

    The caller holds the lock. Raises TuneError when it could not be done; the former settings are served then.
    """
    path, home = change.path, settings.home.resolve()
    if read(path) != change.before:
        raise TuneError(f"{path} was changed meanwhile", "run it again: what was measured is in the history")
    kept = undoing.document(path, change.before, change.after, time.time())
    note = {
        "format": undoing.FORMAT, "model": change.model, "path": str(path), "before": change.before,
        "after": change.after, "record": None if change.undoes is not None else kept,
        "undoes": None if change.undoes is None else str(change.undoes), "done": False,
    }  # fmt: skip
    now = find(settings, change.model)
    with guard.watching(settings):
        try:
            _write_note(home, note)
            say("writing config.pbtxt")
            try:
                undoing.write(path, change.after, like=path, prefix=WRITING)
            except OSError as error:
                raise _unwritable(path, error.strerror or str(error)) from error
            if now is not None:
                now.reload(say)
            _write_note(home, {**note, "done": True})
        except BaseException as error:
            _put_back(settings, note, say, find, error)
            if isinstance(error, _NOT_RELOADED):
                hint = getattr(error, "hint", "") or "see triton.log"
                what = "the settings could not be put in place, the former ones stay"
                raise TuneError(f"{what}: {error}", hint) from error
            raise
        _finish(home, note)
    return now is not None


def undoing_of(settings: Settings, model: str, path: Path, force: bool) -> Change:
    """The last change of a config.pbtxt, the other way round. Raises TuneError where there is none, or the file is not
    as that left it and `force` is not given.
    """
    path = path.resolve()
    former, now = undoing.top(settings.home.resolve(), model, path), read(path)
    if undoing.digest(now) != former.after_sha256 and not force:
        message = f"{path} was changed after the tuning that is to be undone"
        raise TuneError(message, "--force puts the former file there all the same")
    return Change(model, path, now, former.before, former.record)


def recover(
    settings: Settings, say: Say = lambda text: None, wait_s: float = 0.0, find: Find = served
) -> str | None:
    """Undo, or finish, what a process that was killed has left half done; what that was, None where there was nothing.

    Raises TuneError when that cannot be done.
    """
    home = settings.home.resolve()
    if not (home / "tune" / NOTE).exists():
        return None
    try:
        with held(home, wait_s):
            return recover_held(settings, say, find)
    except InUse:  # it is not interrupted
        return None


def recover_held(settings: Settings, say: Say = lambda text: None, find: Find = served) -> str | None:
    """As `recover`, for who holds the lock."""
    home = settings.home.resolve()
    note = _read_note(home)
    if note is None:
        return None
    model = note["model"]
    if note["done"]:
        _finish(home, note)
        told = f"a tuning of {model} that was interrupted had been finished: its settings stay"
    else:
        _restore(settings, note, say, find)
        told = f"a tuning of {model} that was interrupted is undone: its former settings are back"
    problem = auditing.note(settings, "tune", detail=told)
    if problem:
        say(f"this is not in the audit log: {problem}")
    return told


def _put_back(settings: Settings, note: dict[str, Any], say: Say, find: Find, cause: BaseException) -> None:
    """Everything as it was. Ctrl-C does not interrupt this: what it would leave is what this puts in order."""
    with _uninterrupted():
        say("putting the former settings back")
        try:
            _restore(settings, note, say, find)
        except TuneError as error:
            cause.add_note(str(error))
            raise TuneError(f"{cause or type(cause).__name__}; {error}", error.hint) from cause


def _restore(settings: Settings, note: dict[str, Any], say: Say, find: Find) -> None:
    """The former file, and the running stack with it. Raises TuneError; the note stays then."""
    home, path, model = settings.home.resolve(), Path(note["path"]), note["model"]
    try:
        if path.exists() and read(path) == note["after"]:  # what another has written since stays
            undoing.write(path, note["before"], like=path, prefix=WRITING)
    except OSError as error:
        hint = f"its former text is `before` in {home / 'tune' / NOTE}; make it writable and run `truthgpt tune` again"
        raise TuneError(f"{path} could not be put back: {error.strerror}", hint) from error
    now = find(settings, model)
    if now is not None:
        try:
            now.reload(say)
        except _NOT_RELOADED as error:
            raise TuneError(
                f"{path} is as it was, but {model} may be served with other settings: {error}",
                f"run `truthgpt models reload {model}`",
            ) from error
    _remove_note(home)


def _finish(home: Path, note: dict[str, Any]) -> None:
    """Make the record for `--undo`, or take back the one that was undone."""
    try:
        if note["undoes"] is not None:
            Path(note["undoes"]).unlink(missing_ok=True)
        else:
            undoing.push(home, note["model"], note["record"])
        _remove_note(home)
    except OSError as error:
        raise TuneError(
            f"the new settings are in place, but cannot be undone later: {error.strerror}",
            f"{home / 'tune' / NOTE} has the former text; the next `truthgpt tune` tries again",
        ) from error


def _read_note(home: Path) -> dict[str, Any] | None:
    path = home / "tune" / NOTE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != undoing.FORMAT or not all(isinstance(found[k], str) for k in ("path", "before", "after")):
            raise ValueError(f"format {found['format']!r}")
        return {**found, "model": str(found["model"]), "done": found["done"] is True,
                "record": found["record"], "undoes": found["undoes"]}  # fmt: skip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuneError(
            f"{path}, which says what an interrupted tuning was doing, cannot be read: {error}",
            "see that config.pbtxt is as it should be, and remove that file",
        ) from error


def _write_note(home: Path, note: dict[str, Any]) -> None:
    undoing.write(home / "tune" / NOTE, json.dumps(note))


def _remove_note(home: Path) -> None:
    (home / "tune" / NOTE).unlink(missing_ok=True)
    sync_folder(home / "tune")


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)


def _unwritable(path: Path, why: str) -> TuneError:
    return TuneError(f"{path} cannot be replaced: {why}", "check the repository's owner, permissions and space")
