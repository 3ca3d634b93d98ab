"""Child processes: each in a session of its own, so that whatever it starts ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel ends it when the supervisor is gone, however that came about."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """A running program that is the leader of its own process group. Its output goes to `log`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, log_start: int) -> None:
        self.name, self.log = name, log
        self._process = process
        self._log_start = log_start  # bytes; what is before was written by an earlier process

    @classmethod
    async def start(cls, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
        """Start a program. Raises OSError when it cannot be executed."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            log_start = output.tell()
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=dict(env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return cls(name, process, log, log_start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return await self._process.wait()

    def terminate(self) -> None:
        """SIGTERM; a stopped process would keep it pending until it is continued."""
        if self._process.returncode is None:
            # not by asyncio's process: it would look whether it has ended, and take the exit code from the loop
            for number in (signal.SIGTERM, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, up to `grace_s` seconds to end, then SIGKILL to the whole group."""
        if self._process.returncode is None:
            self.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                pass
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL to the whole group, what outlived its leader included."""
        kill_group(self._process.pid)
        await self._process.wait()

    def last_lines(self, count: int = 5) -> str:
        """The end of what it has logged, for an error message."""
        try:
            with self.log.open("rb") as file:
                size = self.log.stat().st_size
                begin = self._log_start if self._log_start <= size else 0  # it has been rotated since
                file.seek(max(begin, size - 8192))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line for line in text.splitlines() if line.strip()]
        telling = [
            line for line in lines if any(word in line.lower() for word in ("error", "failed", "fatal", "refus"))
        ]
        return "\n".join((telling or lines)[-count:])


def kill_group(group: int) -> None:
    """SIGKILL every process of a group; nothing to do is no error."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie waiting to be reaped."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def runs(pid: int) -> bool:
    """Whether a process exists and is neither a zombie nor stopped."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
