"""A worker: one process that serves the application on a socket which the gateway's parent made and keeps open.

    python -m orchestrator.worker NUMBER LISTEN_FD CONTROL_FD

Its settings are in the environment. On the control socket it says a line `alive` and a line `metrics JSON` a second,
and `drained` when it has no request left, and is told `stop`; its end means that the parent is gone, and the worker
ends too. SIGTERM drains.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import signal
import socket
import sys

import uvloop

from orchestrator import logs
from orchestrator.app import Application
from orchestrator.server import Server, configure
from orchestrator.settings import Settings

ALIVE_S = 1.0
LAST_WORDS_S = 0.5  # for the parent to read what it is told at the end
UNREAD_BYTES = 1 << 20  # beyond it nothing more is said to a parent that does not read
_PR_SET_PDEATHSIG = 1


def build(settings: Settings) -> Server:
    """The server of these settings, not yet running; drained, it ends."""
    application = Application(settings)
    return Server(configure(application, settings), lambda: _drain(application))


async def _drain(application: Application) -> None:
    if application.gateway is not None:
        await application.gateway.drain(application.settings.drain_s)


class Worker:
    """What a worker tells its parent and is told by it."""

    def __init__(self, settings: Settings, control: socket.socket) -> None:
        self._control = control
        self._parent: asyncio.StreamWriter | None = None
        self._told = asyncio.Event()
        self.application = Application(settings)
        self.server = Server(configure(self.application, settings), self._drain)

    async def serve(self, listener: socket.socket) -> None:
        """Until drained and told to stop, or until the parent is gone."""
        reader, self._parent = await asyncio.open_connection(sock=self._control)
        listening = asyncio.create_task(self._listen(reader))
        saying = asyncio.create_task(self._say_alive())
        try:
            await self.server.serve([listener])
        finally:
            listening.cancel()
            saying.cancel()
            self._say_metrics()  # the last of its requests count, too
            self._parent.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                await asyncio.wait_for(self._parent.wait_closed(), LAST_WORDS_S)

    async def _drain(self) -> None:
        await _drain(self.application)
        # Others still have requests: until all have finished, this one goes on to say that it is draining.
        self._say(b"drained\n")
        await self._told.wait()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            if await reader.read(64):
                self._told.set()
                self.server.should_exit = True
                return
        self.server.should_exit = self.server.force_exit = True

    async def _say_alive(self) -> None:
        while True:
            if self.server.started:
                self._say(b"alive\n")
                self._say_metrics()
            await asyncio.sleep(ALIVE_S if self.server.started else 0.01)

    def _say_metrics(self) -> None:
        # To a parent that has not read the one before nothing is added: the next one has it all.
        if self.application.metrics is not None and self._unread == 0:
            self._say(b"metrics %s\n" % json.dumps(self.application.metrics.snapshot()).encode())

    def _say(self, line: bytes) -> None:
        # Never waits. A parent that is stopped does not read, and one that is gone ends this process by other means.
        if self._parent is not None and self._unread < UNREAD_BYTES:
            self._parent.write(line)

    @property
    def _unread(self) -> int:
        return 0 if self._parent is None else self._parent.transport.get_write_buffer_size()


def main() -> int:
    """Serve until told otherwise; 0 after a drain."""
    # the kernel ends this process with its parent, even where it is too busy to notice
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    number, listen_fd, control_fd = map(int, sys.argv[1:])
    settings = Settings.load()
    logs.configure(settings, number)
    listener, control = socket.socket(fileno=listen_fd), socket.socket(fileno=control_fd)

    async def serve() -> bool:
        worker = Worker(settings, control)
        # What is there by now stays; requests leave little behind that is not freed without the collector.
        gc.freeze()
        gc.set_threshold(20_000, 20, 100)
        await worker.serve(listener)
        return worker.server.started

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return 0 if runner.run(serve()) else 1


if __name__ == "__main__":
    sys.exit(main())
