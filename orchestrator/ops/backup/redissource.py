"""The Redis of a deployment, whether its stack runs or not: a stopped home's embedded one is started for a while."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from orchestrator.local import alias, state, swap
from orchestrator.local.preflight import belongs
from orchestrator.local.process import alive
from orchestrator.ops.backup.errors import BackupError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    import redis

    from orchestrator.local.redisserver import EmbeddedRedis

RUNNING, GIVEN, STOPPED, NONE = "running", "given", "stopped", "none"
START_S = 60.0  # it may have a large file to load
STOP_S = 30.0  # it writes what is left of that file


def kind(settings: Settings) -> str:
    """Where what Redis knows is: in the running stack's, a given one, the files of a stopped home, or nowhere."""
    found = state.read(settings.home)
    if found is not None and found.running:
        return RUNNING
    if settings.redis_url is not None:
        return GIVEN
    return STOPPED if has_data(settings.home) else NONE


def has_data(home: Path) -> bool:
    """Whether an embedded Redis has left something in this home."""
    folder = home / "redis"
    return folder.is_dir() and any(path.is_file() and path.stat().st_size for path in folder.rglob("*"))


@contextlib.contextmanager
def client(settings: Settings) -> Iterator[redis.Redis | None]:
    """A client of the deployment's Redis; None where there is none that could know anything.

    Of a stopped home the Redis is started, and the home held, meanwhile. Raises BackupError, NoRedis, OSError.
    """
    from orchestrator.ops.redis import connect

    where = kind(settings)
    if where == NONE:
        yield None
    elif where != STOPPED:
        with connect(settings) as found:
            yield found
    else:
        with held(settings.home), started(settings, settings.home) as found:
            yield found


@contextlib.contextmanager
def held(home: Path) -> Iterator[list[Path] | None]:
    """Hold a home, so that no stack starts in it. None, unless a restore that was killed had to be undone first: then
    where is now what stood in the way of that.

    Raises BackupError where a stack runs from it, swap.NoteError, and OSError.
    """
    try:
        lock = state.lock(home)
    except state.AlreadyRunning as error:
        found = state.read(home)
        if found is not None and found.running:
            raise BackupError(str(error), "stop it first: `truthgpt down`") from error
        what = "a stack that starts or stops, a backup or a restore"
        raise BackupError(f"{what} holds {home}", "try again once it has ended") from error
    with lock:
        yield swap.recover(home.resolve())


@contextlib.contextmanager
def started(settings: Settings, home: Path) -> Iterator[redis.Redis]:
    """The embedded Redis of a home that is held, for a while; it ends in order, all of it on the disk.

    Raises BackupError, and NoRedis for what Redis says.
    """
    import redis

    from orchestrator.local.redisserver import EmbeddedRedis, RedisMissing
    from orchestrator.ops.redis import TIMEOUT_S, NoRedis

    found = state.read(home)
    left = found.processes.get("redis") if found is not None else None
    if left is not None and alive(left) and _is_redis(left, home):
        hint = "`truthgpt down` clears it away"
        raise BackupError(f"Redis of a stack that was killed still runs from {home} (process {left})", hint)
    server = EmbeddedRedis(home.resolve(), max_bytes=settings.redis_max_bytes)
    try:
        with _running(server, home / "logs" / "redis.log"):
            with redis.Redis.from_url(server.url, socket_timeout=TIMEOUT_S) as opened:
                yield opened
    except RedisMissing as error:
        raise BackupError(str(error), "pip install 'truthgpt[serve]'") from error
    except redis.RedisError as error:
        raise NoRedis(f"Redis of {home} failed: {error}", "`truthgpt doctor` looks for the cause") from error
    finally:
        alias.clear(home.resolve())


def _is_redis(pid: int, home: Path) -> bool:
    """Whether a process is this home's Redis: another program may have its number by now."""
    try:
        line = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
    return "redis-server" in line and any(belongs(pid, path) for path in (home.resolve(), home.absolute()))


@contextlib.contextmanager
def _running(server: EmbeddedRedis, log: Path) -> Iterator[None]:
    """Run the server in an event loop of its own, in a thread that lives as long: it ends with the thread."""
    ready, failure = threading.Event(), list[BaseException]()
    loop = asyncio.new_event_loop()
    ending = asyncio.Event()

    async def serve() -> None:
        child = await server.start(log, START_S)
        try:
            ready.set()
            await ending.wait()
        finally:
            await child.stop(STOP_S)
        if child.returncode != 0:
            hint = f"the log is {log}"
            raise BackupError(f"Redis did not end in order: {child.last_lines() or child.returncode}", hint)

    def work() -> None:
        try:
            loop.run_until_complete(serve())
        except TimeoutError as error:
            failure.append(BackupError(str(error), f"the log is {log}"))
        except BaseException as error:  # handed to whoever waits for this thread
            failure.append(error)
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=work, name="redis", daemon=True)
    thread.start()
    try:
        ready.wait()  # START_S at most
        if not failure:
            yield
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(ending.set)
        thread.join()
        if failure:
            raise failure[0]
