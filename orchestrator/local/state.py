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

from orchestrator.local.places import Place
from orchestrator.local.process import alive


class AlreadyRunning(Exception):
    """Another supervisor holds this home."""


@dataclass(frozen=True)
class State:
    """Addresses and processes of a stack; `grpc` is empty where it is switched off. `started` is a Unix time in
    seconds; `created` the supervisor's start as the kernel has it. `servers` are the stack's own Triton servers;
    `triton_http`, `triton_grpc` and `shm_prefix` are the first one's. Where it uses others it has none of its own, and
    `triton_http` says which it uses. A file of a version that knew of one server alone has no `servers`.
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
    servers: list[Place] | None = None

    @property
    def tritons(self) -> list[Place]:
        """The stack's own Triton servers."""
        if self.servers is not None:
            return self.servers
        return [Place("triton", self.triton_http, self.triton_grpc, "", self.shm_prefix)]

    @property
    def triton_pids(self) -> list[int]:
        """Their processes, of those that have one."""
        return [self.processes[place.name] for place in self.tritons if place.name in self.processes]

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
        found = json.loads(path(home).read_text(encoding="utf-8"))
        servers = found.pop("servers", None)
        return State(**found, servers=None if servers is None else [Place(**server) for server in servers])
    except (OSError, ValueError, TypeError, AttributeError):
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
