"""The gateway's first process: it holds the sockets, keeps the workers running and serves the admin application.

    python -m orchestrator.app

Each worker has a listening socket of its own on the same address. The parent has it too: when a worker dies, whoever
has connected meanwhile waits in its queue for the next one and is not refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping

from orchestrator import audit, logs, tracing
from orchestrator.app import AdminApplication
from orchestrator.jobs.table import ScheduleError, schedules
from orchestrator.metrics import Metrics
from orchestrator.scrape import Scrape, build_info
from orchestrator.server import IN_BAND_S, BindError, Server, configure, listen, raise_file_limit, reserve, url
from orchestrator.settings import CONFIG_ENV, Settings, SettingsError
from orchestrator.upkeep import END_S as UPKEEP_END_S
from orchestrator.upkeep import Upkeep

log = logging.getLogger("orchestrator.parent")  # run as a program, its module has no name of its own

TICK_S = 1.0
SILENT_TICKS = 10  # a worker says `alive` every second; time in which the parent itself is suspended does not count
START_TICKS = 60
STEADY_S = 10.0  # a worker that dies sooner counts as a failure in a row
ADMIN_CONNECTIONS = 100
LINE_BYTES = 16 << 20  # of a worker's metrics; what they really take is a hundredth of it
LAST_WORDS_S = 1.0  # for what an ended worker had said to be read
END_S = 3.0  # for a drained worker to end
FAILURES = 5  # in a row, and the parent gives up


def backoff_s(failures: int) -> float:
    """Pause before a worker's next start: none after the first failure, then 0.5 s doubling to 4 s."""
    return 0.0 if failures <= 1 else float(min(4.0, 0.5 * 2 ** min(failures - 2, 10)))


class Worker:
    """One worker process, and what it has said so far. `up` is set as soon as it serves."""

    def __init__(
        self, number: int, process: asyncio.subprocess.Process, reader: asyncio.StreamReader,
        control: asyncio.StreamWriter, up: asyncio.Event, scrape: Scrape,
    ) -> None:  # fmt: skip
        self.number, self.process = number, process
        self.drained = asyncio.Event()
        self._reader, self._control, self._up, self._scrape = reader, control, up, scrape
        self._serves = False
        self._silent_ticks = 0
        self._listening = asyncio.create_task(self._listen(), name=f"worker {number} control")

    @classmethod
    async def start(
        cls, number: int, listener: socket.socket, environ: Mapping[str, str], up: asyncio.Event, scrape: Scrape
    ) -> Worker:
        """Raises OSError or RuntimeError where no process, no thread that waits for it or no file is to be had."""
        ours, theirs = socket.socketpair()
        files = (listener.fileno(), theirs.fileno())
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "orchestrator.worker", *map(str, (number, *files)),
                    env=environ, stdin=asyncio.subprocess.DEVNULL, pass_fds=files,
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        scrape.started(number, process.pid)
        reader, control = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        return cls(number, process, reader, control, up, scrape)

    async def end(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        code = await self.process.wait()
        await asyncio.wait([self._listening], timeout=LAST_WORDS_S)
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        self._control.close()
        self._scrape.ended(self.number)
        self.drained.set()
        return code

    def tick(self) -> None:
        """To be called every TICK_S: ends a worker that does not answer any more, or was drained by someone else."""
        self._silent_ticks += 1
        if self.drained.is_set():
            self.stop()
        elif self._silent_ticks > (SILENT_TICKS if self._serves else START_TICKS):
            log.error("worker %d says nothing: ending it", self.number)
            self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def stop(self) -> None:
        """Tell it to end now."""
        self._control.write(b"stop\n")

    async def _listen(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                self._silent_ticks, self._serves = 0, True
                self._up.set()
                said, _, what = line.rstrip().partition(b" ")
                if said == b"drained":
                    self.drained.set()
                elif said == b"metrics" and line.endswith(b"\n"):  # one that died may have said half of it
                    self._scrape.heard(self.number, what)


class Parent:
    """`run` returns the process's exit code: 0 after a drain, 1 when workers do not start or keep dying."""

    def __init__(self, settings: Settings, listeners: list[socket.socket]) -> None:
        self._settings, self._listeners = settings, listeners
        # A worker that starts later gets what this process has read, whatever the file says by then.
        self._environ = {**os.environ, **settings.child_environ(), CONFIG_ENV: ""}
        self._workers: dict[int, Worker] = {}
        self._up, self._ending = asyncio.Event(), asyncio.Event()
        self.metrics = Metrics(lambda model: False)
        self.metrics.readings["truthgpt_cpu_seconds_total"] = lambda: {(): time.process_time()}
        self.metrics.readings["truthgpt_build_info"] = build_info
        self.scrape = Scrape(len(listeners), self.metrics.snapshot)
        self.on_ending: Callable[[], object] = lambda: None  # called when the drain begins
        self._exit_code = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, number)
        ticking = asyncio.create_task(self._tick(), name="tick")
        # The first one alone: what is wrong with all of them is said once.
        keepers = [asyncio.create_task(self._keep(1), name="worker 1")]
        await _first_of(self._up, self._ending)
        if not self._ending.is_set():
            others = range(2, len(self._listeners) + 1)
            keepers += [asyncio.create_task(self._keep(n), name=f"worker {n}") for n in others]
            log.info("listening on %s", url(self._settings.host, self._settings.http_port))
            if self._settings.grpc:
                log.info("gRPC on %s", url(self._settings.host, self._settings.grpc_port, "grpc"))
            await self._ending.wait()
        self.on_ending()
        await self._end(keepers)
        ticking.cancel()
        return self._exit_code

    def _told(self, number: signal.Signals) -> None:
        if not self._ending.is_set():
            log.info("%s: draining", number.name)
            self._ending.set()
        else:  # told twice: stop now
            self._exit_code = 1
            for worker in self._workers.values():
                worker.signal(signal.SIGKILL)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.scrape.tick()
            if not self._ending.is_set():
                for worker in self._workers.values():
                    worker.tick()

    async def _keep(self, number: int) -> None:
        """Start this worker, again and again, until the end."""
        loop, failures = asyncio.get_running_loop(), 0
        while not self._ending.is_set():
            began = loop.time()
            try:
                worker = await Worker.start(number, self._listeners[number - 1], self._environ, self._up, self.scrape)
            except (OSError, RuntimeError) as error:
                how = f"worker {number} cannot be started ({error})"
            else:
                self._workers[number] = worker
                if self._ending.is_set():
                    worker.signal(signal.SIGTERM)
                code = await worker.end()
                del self._workers[number]
                how = f"worker {number} ended with {signal.Signals(-code).name if code < 0 else code}"
            if self._ending.is_set():
                return
            failures = failures + 1 if loop.time() - began < STEADY_S else 1
            if failures == FAILURES or not self._up.is_set():
                log.error("%s: giving up", how)
                self._exit_code = 1
                self._ending.set()
                return
            log.error("%s: starting another", how)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), backoff_s(failures))

    async def _end(self, keepers: list[asyncio.Task[None]]) -> None:
        """Every worker drains and says 503 until the last one has drained; then all end."""
        for worker in self._workers.values():
            worker.signal(signal.SIGTERM)
        waiting = [asyncio.create_task(worker.drained.wait()) for worker in self._workers.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=self._settings.drain_s + IN_BAND_S)
        for listener in self._listeners:
            listener.close()
        for worker in self._workers.values():
            worker.stop()
        _, late = await asyncio.wait(keepers, timeout=END_S)
        for worker in tuple(self._workers.values()):
            worker.signal(signal.SIGKILL)
        if late:
            log.error("%d workers did not end in time and were killed", len(late))
        await asyncio.gather(*keepers, *waiting)


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def serve(settings: Settings, listeners: list[socket.socket], ops: list[socket.socket]) -> int:
    """Keep workers on `listeners` and the admin application on `ops` until told to end; the exit code."""

    async def nothing_to_drain() -> None:
        return

    parent = Parent(settings, listeners)
    upkeep = Upkeep(settings, parent.scrape, parent.metrics)
    application = AdminApplication(settings, parent.scrape.text, upkeep.figures, parent.metrics)
    config = configure(application, settings, connections=ADMIN_CONNECTIONS)
    admin = Server(config, nothing_to_drain)
    serving = asyncio.create_task(admin.serve_beside(ops), name="admin")
    keeping = asyncio.create_task(upkeep.run(), name="upkeep")
    parent.on_ending = keeping.cancel
    code = await parent.run()
    admin.should_exit = True
    await asyncio.wait([keeping], timeout=UPKEEP_END_S)
    await serving
    return code


def main() -> int:
    """Serve until SIGTERM or SIGINT; 0 after a drain, 1 when it cannot serve, 2 for wrong settings."""
    try:
        settings = Settings.load()
        tracing.check(settings)
        audit.check(settings)
        schedules(settings)
        raise_file_limit()
        listeners = listen(settings.host, settings.http_port, settings.workers)
        ops = listen(settings.ops_host, settings.ops_port)
        reserved = reserve(settings.host, settings.grpc_port) if settings.grpc else None
    except SettingsError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except ScheduleError as error:
        print(f"error: {error}: {error.hint}", file=sys.stderr)
        return 2
    except tracing.TracingMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (audit.AuditKeyError, audit.AuditLogError) as error:
        print(f"error: {error}: {error.hint}", file=sys.stderr)
        return 1
    except BindError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        logs.configure(settings)
    except OSError as error:
        print(f"error: the log cannot be written: {error}", file=sys.stderr)
        return 1
    for warning in settings.warnings:
        log.warning("%s", warning)
    with reserved or contextlib.nullcontext():
        return asyncio.run(serve(settings, listeners, ops))


if __name__ == "__main__":
    sys.exit(main())
