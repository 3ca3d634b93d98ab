"""Stopping a stack from outside: asked first, killed as a last resort, and nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from orchestrator.local import alias, state, tritonserver
from orchestrator.local.preflight import end_leftover
from orchestrator.local.process import alive, kill_group
from orchestrator.settings import Settings

SLACK_S = 30.0  # beyond drain_s: Triton's exit, Redis and the supervisor itself
KILLED_S = 5.0


class StopError(Exception):
    """The stack could not be stopped; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass
class Stopped:
    """`pid` of the supervisor that was stopped, None when none ran; the rest is what was cleared away after a kill."""

    pid: int | None = None
    killed: bool = False
    stale: bool = False
    processes: list[int] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)

    @property
    def leftovers(self) -> bool:
        return self.stale or bool(self.processes or self.regions)


def stop(settings: Settings, timeout_s: float) -> Stopped:
    """Stop the home's supervisor, if one runs, and clear leftovers. Raises StopError when it cannot be ended."""
    home = settings.home.resolve()
    done = Stopped()
    supervisor = _supervisor(home)
    if supervisor is not None:
        done.pid = supervisor.pid
        done.killed = not _end(supervisor, timeout_s)
    # Nobody starts here while it is cleared; where the folder itself is gone there is nothing to lock.
    with _lock(home) if home.is_dir() else contextlib.nullcontext():
        _clear(home, settings, done)
    return done


def _lock(home: Path) -> IO[str]:
    # A killed process looks dead while threads of its still hold its files: a lock that stays is somebody else's.
    deadline = time.monotonic() + KILLED_S
    while True:
        try:
            return state.lock(home)
        except state.AlreadyRunning as error:
            if time.monotonic() > deadline:
                raise StopError(f"{error}, started just now", "run `truthgpt down` again") from error
        time.sleep(0.05)


def _supervisor(home: Path) -> psutil.Process | None:
    """The process that runs this home's stack: by the state file, while it still starts by its lock, and where
    somebody has removed the folder below it by the server that it started."""
    found = state.read(home)
    if found is not None and found.running:
        try:
            return psutil.Process(found.pid)
        except psutil.NoSuchProcess:
            return None
    holder = lock_holder(home)
    if holder is None:
        parents = [server.parent() for server in servers(home)]
        return next((parent for parent in parents if parent is not None and _is_supervisor(parent)), None)
    return holder


def servers(home: Path) -> list[psutil.Process]:
    """Every tritonserver that this home's supervisors have started, whatever has become of them."""
    return tritonserver.servers(tritonserver.shm_prefix(home))


def _is_supervisor(process: psutil.Process) -> bool:
    try:
        return "up" in process.cmdline()[1:]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def lock_holder(home: Path) -> psutil.Process | None:
    """The process of ours that has this home's lock, None when it is free."""
    path = home / "lock"
    if not path.exists():
        return None
    inode = path.stat().st_ino
    held = set()
    for line in Path("/proc/locks").read_text().splitlines():
        match line.split():  # 1: FLOCK ADVISORY WRITE <pid> <major>:<minor>:<inode> 0 EOF
            case [_, "FLOCK", _, _, owner, where, *_] if where.endswith(f":{inode}") and owner.isdigit():
                held.add(int(owner))
    for pid in held - {os.getpid()}:
        try:
            process = psutil.Process(pid)
            if any(file.path == str(path) for file in process.open_files()):  # inodes repeat across file systems
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def _end(process: psutil.Process, timeout_s: float) -> bool:
    """Ask it to stop; False when it had to be killed. Raises StopError when it may not be touched."""
    try:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # a stopped process takes SIGTERM once it is continued
        if _until(lambda: not alive(process.pid), timeout_s):
            return True
        process.kill()
        if not _until(lambda: not alive(process.pid), KILLED_S):
            hint = f"it may hang in the kernel: see `ps -o stat,wchan -p {process.pid}`"
            raise StopError(f"process {process.pid} does not end", hint)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied as error:
        hint = "stop it as the user who started it"
        raise StopError(f"process {process.pid} belongs to somebody else", hint) from error
    return False


def _clear(home: Path, settings: Settings, done: Stopped) -> None:
    old = state.read(home)
    if old is not None:
        done.stale = True
        # The supervisor's children die with it by the kernel's hand; this is for those that did not.
        left = [pid for pid in old.processes.values() if alive(pid)]
        for pid in left:
            for spelling in {home, settings.home.absolute()}:
                end_leftover(pid, spelling)
        done.processes += [pid for pid in left if _until(lambda pid=pid: not alive(pid), 1.0)]  # type: ignore[misc]
    for server in servers(home):
        kill_group(server.pid)
        done.processes.append(server.pid)
    # A state file of another version of truthgpt cannot be read, and may not stay either.
    done.stale = done.stale or state.path(home).exists()
    state.clear(home)
    prefix = tritonserver.shm_prefix(settings.home)
    done.processes += [stub.pid for stub in tritonserver.orphans(prefix)]
    done.regions += tritonserver.sweep(prefix, kill=True)
    alias.clear(settings.home)


def _until(holds: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
