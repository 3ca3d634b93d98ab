"""A Triton of its own to measure on: nothing that happens to it touches what is served.

It lives in home/tune/scratch-…, on loopback ports that were free, with a shared memory prefix of its own. The kernel
ends it when this process is gone (local/process.py). Its folder is locked for as long as this process lives: one that
can be locked is a dead process's, and is cleared away by the next tuning, or by `truthgpt cleanup`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.errors import TruthGPTError, UpstreamUnavailable
from orchestrator.local import alias, tritonserver
from orchestrator.local.process import Child, kill_group, runs
from orchestrator.ops.tune.errors import CandidateError, TuneError
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Repository, Triton

FOLDER, PREFIX = "tune", "scratch-"
POLL_S = 0.05
STARTS = 3  # another program may take a port between its choice and the server's start
START_S = 60.0
UNLOAD_S = 15.0
END_S = 7.0
REASON_CHARS = 300


class Scratch:
    """A context: the server runs within it. `load_s` bounds a load. Raises TuneError, ServerMissing or AliasError."""

    def __init__(self, settings: Settings, load_s: float) -> None:
        self._load_s, self._stall_s = load_s, settings.engine_stall_s
        self._given = settings
        self._first: dict[str, Mapping[str, Any]] = {}
        self._loaded: str | None = None
        self._child: Child | None = None
        self._triton: Triton | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._settings.triton_http_port}"

    async def __aenter__(self) -> Scratch:
        self._installation = tritonserver.find()
        self._folder, self._lock = _made(self._given.home.resolve() / FOLDER)
        self._prefix = tritonserver.shm_prefix(self._folder)
        try:
            self._take_backends()
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def load_first(self, name: str, config: Mapping[str, Any]) -> None:
        """Load the graph that the model in front needs, now and whenever the server is started anew.

        Raises CandidateError.
        """
        self._first[name] = config
        await self._load(name, config)

    async def serve(self, name: str, config: Mapping[str, Any]) -> None:
        """Have a model served with this configuration, and with no other. Raises CandidateError when it does not come
        up; TuneError when no server can be had any more.
        """
        if not await self._unloaded():
            await self._start_anew()
        self._loaded = name
        await self._load(name, config)

    async def _load(self, name: str, config: Mapping[str, Any]) -> None:
        triton = self._triton
        if triton is None:
            raise RuntimeError("use it as a context")
        repository = Repository(triton, f"127.0.0.1:{self._settings.triton_grpc_port}")
        try:
            await repository.load(name, self._load_s, config)
            deadline = time.monotonic() + self._load_s
            while True:
                try:
                    await repository.beat(name, self._stall_s)
                    return
                except UpstreamUnavailable:
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(POLL_S)
        except TruthGPTError as error:
            raise CandidateError(f"it does not load: {self._reason(error)}") from error

    async def _unloaded(self) -> bool:
        """Whether the server lives and has nothing loaded but what comes first."""
        if self._child is None or self._triton is None or self._child.returncode is not None:
            return False
        if self._loaded is None:
            return True
        repository = Repository(self._triton)
        deadline = time.monotonic() + UNLOAD_S
        try:
            await repository.unload(self._loaded, UNLOAD_S)
            while any(row.occupied for row in await repository.rows(self._loaded)):
                if time.monotonic() > deadline:
                    return False
                await asyncio.sleep(POLL_S)
        except TruthGPTError:
            return False
        return not tritonserver.stubs(self._child.pid, self._loaded)

    async def _start_anew(self) -> None:
        await self._end()
        await self._start()
        for name, config in self._first.items():
            await self._load(name, config)

    async def _start(self) -> None:
        for _ in range(STARTS):
            http, grpc, metrics = _free_ports()
            self._settings = replace(
                self._given, home=self._folder, triton_http_port=http, triton_grpc_port=grpc,
                triton_metrics_port=metrics,
            )  # fmt: skip
            try:
                argv = tritonserver.command(self._installation, self._settings, [])
                env = tritonserver.environment(self._installation)
                self._child = await Child.start("triton", argv, env, self._folder / "triton.log")
            except OSError as error:
                raise _unwritable(self._folder, error) from error
            self._triton = Triton(self.url, Deadlines(heartbeat_s=self._settings.heartbeat_timeout_s))
            self._loaded = None
            if await self._ready():
                return
            said = self._child.last_lines(2)
            await self._end()
        raise TuneError(
            f"the server to measure on did not start: {said or 'it said nothing'}", "`truthgpt doctor` looks for causes"
        )

    def _take_backends(self) -> None:
        """What somebody has put beside our backends, such as Triton's own ones, is needed here, too."""
        theirs, ours = (home / "triton" / "backends" for home in (self._given.home.resolve(), self._folder))
        try:
            for folder in theirs.iterdir() if theirs.is_dir() else ():
                if folder.is_dir() and not folder.name.startswith("."):
                    shutil.copytree(folder, ours / folder.name, copy_function=_linked)
        except (OSError, shutil.Error) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise TuneError(f"the backends in {theirs} cannot be used: {what}", "see whose they are") from error

    async def _ready(self) -> bool:
        deadline = time.monotonic() + START_S
        while self._child is not None and self._child.returncode is None and time.monotonic() < deadline:
            with contextlib.suppress(TruthGPTError):
                if self._triton is not None and isinstance(await self._triton.index(), dict):
                    return True
            await asyncio.sleep(POLL_S)
        return False

    async def _end(self) -> None:
        """End the server and all that belongs to it."""
        triton, child = self._triton, self._child
        self._triton = self._child = None
        if triton is not None:
            await triton.close()  # a server does not exit while a connection to it is open
        if child is not None:
            try:
                child.terminate()
                deadline = time.monotonic() + END_S
                while child.returncode is None and time.monotonic() < deadline:
                    stubs = tritonserver.stubs(child.pid)
                    if not stubs or not all(runs(stub.pid) for stub in stubs):
                        break  # by itself it would look only once a second, and wait for dead ones
                    await asyncio.sleep(POLL_S)
            finally:
                kill_group(child.pid)
            await child.wait()
        tritonserver.sweep(self._prefix, kill=True)

    async def _close(self) -> None:
        try:
            await self._end()
        finally:
            _clear(self._folder)
            os.close(self._lock)

    def _reason(self, error: TruthGPTError) -> str:
        """What the backend said, without Triton's wrapping and the backend's traceback."""
        if self._child is not None and self._child.returncode is not None:
            return f"the server ended (exit code {self._child.returncode})"
        text = str(error).partition("\n\nAt:")[0]
        for mark in ("TritonModelException: ", "state: Internal: ", "state: "):
            if mark in text:
                text = text.partition(mark)[2]
                break
        return " ".join(text.split())[:REASON_CHARS]


def clear_abandoned(home: Path) -> int:
    """End and remove what tunings that were killed have left; how many there were."""
    cleared = 0
    for folder in (home.resolve() / FOLDER).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it has just gone, or is another's
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear_processes(folder)
                _clear(folder)
                cleared += 1
            except BlockingIOError:  # its owner lives
                continue
            finally:
                os.close(handle)
    return cleared


def clear_processes(folder: Path) -> None:
    """End what runs for a scratch folder whose owner is dead, and remove its shared memory and its links."""
    prefix = tritonserver.shm_prefix(folder)
    for server in tritonserver.servers(prefix):
        kill_group(server.pid)
    tritonserver.sweep(prefix, kill=True)
    alias.clear(folder)


def _made(parent: Path) -> tuple[Path, int]:
    """A fresh folder and the descriptor that keeps it locked. Raises TuneError."""
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(parent, error) from error
    fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, handle


def _linked(source: str, target: str) -> None:
    """The same file under another name, as they are large; a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _unwritable(folder: Path, error: OSError) -> TuneError:
    return TuneError(f"{folder} cannot be used: {error.strerror}", "free space, or choose another home with --home")


def _clear(folder: Path) -> None:
    alias.clear(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> tuple[int, int, int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        first, second, third = (int(probe.getsockname()[1]) for probe in probes)
        return first, second, third
