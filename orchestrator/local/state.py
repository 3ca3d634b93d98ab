"""The state file: how other commands find the running stack of a home."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import psutil

from orchestrator.local.process import alive


class AlreadyRunning(Exception):
    """Another supervisor holds this home."""


@dataclass(frozen=True)
class State:
    """Addresses and processes of a stack; `grpc` is empty where it is switched off. `started` is a Unix time in
    seconds; `created` the supervisor's start as the kernel has it.
    """

    pid: int
    created: float
    started: float
    http: str
    grpc: str
    ops: str
    triton_http: str
    triton_grpc: str
    redis: str
    model: str
    shm_prefix: str
    processes: dict[str, int] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Whether the supervisor that wrote this still runs (a pid that another program has taken does not count)."""
        if not alive(self.pid):
            return False
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.created) < 2.0)
        except psutil.NoSuchProcess:
            return False


def path(home: Path) -> Path:
    return home / "state.json"


def read(home: Path) -> State | None:
    """The state of a home, or None when there is none (or it is not one of ours)."""
    try:
        return State(**json.loads(path(home).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write(home: Path, state: State) -> None:
    """Replace the state file in one step; only its owner may read it."""
    handle, name = tempfile.mkstemp(dir=home, prefix="state-")  # created 0600
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file, indent=1)
    os.replace(name, path(home))


def clear(home: Path) -> None:
    path(home).unlink(missing_ok=True)


def lock(home: Path) -> IO[str]:
    """Hold a home for as long as the returned file is open. Raises AlreadyRunning when somebody else holds it."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (home / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise AlreadyRunning(f"a stack is already running from {home}") from error
    return file
