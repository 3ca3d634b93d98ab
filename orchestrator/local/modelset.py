"""Which models of a home are to be served, and in which version: a file that outlives a crash of Triton.

The supervisor writes it when it starts, `truthgpt models load|unload|reload` change it, and after a restart of Triton
the supervisor loads what it says. Whoever changes it holds a lock, so that two operators do not work at once. A second
lock, one a model, is held by whoever loads or unloads that model: an operator, or the supervisor that mends it, on
several servers at once if need be. So the two do not undo each other's work, and an operator who is busy with one model
keeps no other one from being mended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.triton.repository import ENGINE

POLL_S = 0.1


class Busy(Exception):
    """Somebody else is loading or unloading models; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def path(home: Path) -> Path:
    return home / "models.json"


def read(home: Path) -> dict[str, int]:
    """Model -> version, in the order in which they were loaded; empty where there is no such file."""
    try:
        found = json.loads(path(home).read_text(encoding="utf-8"))
        return {str(name): int(version) for name, version in found["models"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write(home: Path, models: Mapping[str, int]) -> None:
    """Replace the file in one step."""
    handle, name = tempfile.mkstemp(dir=home, prefix="models-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"models": dict(models)}, file, indent=1)
    os.replace(name, path(home))


def clear(home: Path) -> None:
    path(home).unlink(missing_ok=True)


@contextlib.contextmanager
def changing(home: Path, model: str, wait_s: float) -> Iterator[None]:
    """Hold both locks while a model is loaded or unloaded. Raises Busy when one is another's for all of `wait_s`."""
    deadline = time.monotonic() + wait_s
    with _held(_lock_path(home), model, "another command is", deadline):
        with _held(_model_lock_path(home, model), model, "the supervisor is", deadline):
            yield


@contextlib.contextmanager
def mending(home: Path, model: str) -> Iterator[None]:
    """Hold the lock of one model and its graph, beside others who mend it on other servers.

    Raises Busy when an operator has it.
    """
    with _held(_model_lock_path(home, model), model, "another command is", 0.0, fcntl.LOCK_SH):
        yield


def changed_now(home: Path) -> str | None:
    """The model that an operator is loading or unloading at this moment."""
    try:
        with _lock_path(home).open("r", encoding="utf-8") as file:
            if _try(file.fileno()):
                return None
            return str(json.loads(file.read())["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _held(path: Path, model: str, who: str, deadline: float, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    with path.open("a+", encoding="utf-8") as file:
        while not _try(file.fileno(), kind):
            if time.monotonic() >= deadline:
                raise Busy(f"{who} {_told(path) or 'changing what is loaded'}", "wait until it has ended")
            time.sleep(POLL_S)
        file.truncate(0)
        with contextlib.suppress(OSError):  # the lock needs no space; on a full disk nobody is told who has it
            os.write(file.fileno(), json.dumps({"model": model, "pid": os.getpid()}).encode())
        try:
            yield
        finally:
            file.truncate(0)


def _told(path: Path) -> str:
    """What the holder of a lock is doing."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"working on {holder['model']} (process {holder['pid']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _lock_path(home: Path) -> Path:
    return home / "models.lock"


def _model_lock_path(home: Path, model: str) -> Path:
    """A graph has the lock of its model: the two come and go together."""
    return home / f"models-{model.removesuffix(ENGINE)}.lock"


def _try(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
