"""Running the supervisor: in this process until it is told to stop, or in a process of its own that stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator import rotation
from orchestrator.cli import stack, welcome
from orchestrator.cli.base import INTERRUPTED, CommandError
from orchestrator.cli.progress import Progress
from orchestrator.local import state
from orchestrator.local.redisserver import RedisMissing
from orchestrator.local.supervisor import Supervisor
from orchestrator.ops import verification
from orchestrator.settings import Settings

POLL_S = 0.1
SLACK_S = 60.0  # what a start may take beside the two waits that start_timeout_s bounds


def foreground(
    settings: Settings, served: Sequence[str], progress: Progress, *, as_json: bool, hello: bool, quiet: bool
) -> None:
    """Serve these models, the default one first, until SIGINT or SIGTERM; none where others' servers have theirs.

    Raises Exit when that came before the stack was ready, or what stopped it.
    """
    try:
        code = asyncio.run(_Foreground(settings, served, progress, as_json, hello, quiet).run())
    except state.AlreadyRunning as error:
        raise CommandError(str(error), "`truthgpt status` shows it, `truthgpt down` stops it") from error
    except RedisMissing as error:
        raise CommandError(str(error), "`truthgpt doctor` checks the whole set-up") from error
    except TimeoutError as error:
        raise CommandError(str(error), f"see {settings.home / 'logs' / 'redis.log'}") from error
    if code:
        raise click.exceptions.Exit(code)


class _Foreground:
    def __init__(
        self, settings: Settings, served: Sequence[str], progress: Progress, as_json: bool, hello: bool, quiet: bool
    ) -> None:
        self._settings, self._progress = settings, progress
        self._as_json, self._hello, self._quiet = as_json, hello, quiet
        self._supervisor = Supervisor(settings, served, progress.step, verification.graph_refusal)
        self._state: state.State | None = None
        self._presenting: asyncio.Task[None] | None = None
        self._stopped_by = 0
        self._failed = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            await self._supervisor.run(self._on_ready)
        finally:
            if self._presenting is not None:
                self._presenting.cancel()
                await asyncio.gather(self._presenting, return_exceptions=True)
        if self._state is None:
            return INTERRUPTED if self._stopped_by == signal.SIGINT else 128 + self._stopped_by
        self._progress.line("stopped")
        return 1 if self._failed else 0

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stopped_by:
            self._stopped_by = number
            self._supervisor.stop()
            return
        self._supervisor.hurry()

    def _on_ready(self, found: state.State) -> None:
        self._state = found
        self._progress.step("ready")
        self._progress.stop()
        if not self._quiet:
            self._presenting = asyncio.create_task(self._present(found))

    async def _present(self, found: state.State) -> None:
        # In a thread: the answer is read by blocking calls, and the supervisor goes on watching meanwhile.
        shown = (self._settings, found, self._as_json, self._hello, False)
        self._failed = not await asyncio.to_thread(welcome.present, *shown)


def detached(settings: Settings, model: str, progress: Progress, *, as_json: bool, hello: bool) -> None:
    """Start the same command in a session of its own and return when it is ready. Raises Exit if it ends instead."""
    home = settings.home.absolute()
    log = home / "logs" / "supervisor.log"
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    rotation.trim(log, settings.log_max_bytes, settings.log_files)
    argv = [sys.executable, "-m", "orchestrator.cli", "up", "--background"]
    env = {**os.environ, **settings.child_environ(model=model)}
    with log.open("ab") as output:
        start = output.tell()
        child = subprocess.Popen(  # noqa: S603 (our own program, no shell)
            argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        found = _wait(child, settings, _Tail(log, start), progress)
    except BaseException:
        _end(child, settings)
        raise
    progress.stop()
    if not welcome.present(settings, found, as_json, hello, detached=True):
        raise click.exceptions.Exit(1)


def _wait(child: subprocess.Popen[bytes], settings: Settings, tail: _Tail, progress: Progress) -> state.State:
    deadline = time.monotonic() + 2 * settings.start_timeout_s + SLACK_S
    while True:
        found = stack.running(settings)
        ready = found is not None and found.pid == child.pid
        ended = child.poll()
        for line in tail.lines():
            progress.line(line)
        if ready and found is not None:
            return found
        if ended is not None:
            # Its error and hint have just been shown; a signal's number is negative.
            if not tail.failed:
                click.echo(f"error: the stack ended while it started (exit code {ended})", err=True)
                click.echo(f"hint: see {tail.path}", err=True)
            raise click.exceptions.Exit(1)
        if time.monotonic() > deadline:
            hint = f"see {tail.path}, or raise TRUTHGPT_START_TIMEOUT_S"
            raise CommandError("the stack did not become ready in time", hint)
        time.sleep(POLL_S)


def _end(child: subprocess.Popen[bytes], settings: Settings) -> None:
    """Let a stack that nobody waits for any more stop; it removes what it has made."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(settings.drain_s + SLACK_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class _Tail:
    """The lines that a log has grown by since it was last read, from `start` bytes on."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.failed = False
        self._at = start
        self._rest = b""

    def lines(self) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        shown = [line.decode("utf-8", "replace") for line in lines]
        self.failed = self.failed or any(line.startswith("error: ") for line in shown)
        return shown
