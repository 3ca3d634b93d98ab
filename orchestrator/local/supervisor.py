"""Starts Triton, Redis and the gateway, keeps them alive, and stops them without leaving anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

import aiohttp
import psutil

from orchestrator import models, rotation
from orchestrator.errors import TruthGPTError
from orchestrator.local import alias, modelset, preflight, state, swap, tritonserver
from orchestrator.local.modelwatch import Faults, ModelWatch
from orchestrator.local.preflight import StartError
from orchestrator.local.process import Child, runs
from orchestrator.local.redisserver import EmbeddedRedis, RedisMissing
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Triton

POLL_S = 0.4
GATEWAY_SILENT_S = 10.0
GATEWAY_END_S = 8.0  # more than its parent process waits for its workers once they have drained
LOGS_S = 5.0
LOGS_FAILED_S = 300.0
ENGINE_VERSIONS = 2  # that the config.pbtxt of a graph alone has loaded: the entry in front is switched after it

Report = Callable[[str], None]


class Supervisor:
    """One home's stack. `run` returns when `stop` is called; `report` gets one line an event, for people.

    `served` are the models to start with, the default one first; later ones come and go with the model set. `refusal`
    is asked of each before Triton loads it, for what no backend of ours checks.
    """

    def __init__(self, settings: Settings, served: Sequence[str], report: Report, refusal: preflight.Refusal) -> None:
        self._settings, self._served, self._report, self._refusal = settings, tuple(served), report, refusal
        self._model = self._served[0]
        self._home = settings.home.resolve()
        self._logs = self._home / "logs"
        self._prefix = tritonserver.shm_prefix(settings.home)
        self._triton_url = f"http://127.0.0.1:{settings.triton_http_port}"
        self._children: dict[str, Child] = {}
        self._stopping = asyncio.Event()
        self._redis: EmbeddedRedis | None = None
        self._started = time.time()

    def stop(self) -> None:
        """Ask `run` to drain and return; may be called from a signal handler."""
        self._stopping.set()

    async def run(self, ready: Callable[[state.State], None]) -> None:
        """Start everything, call `ready` once requests can be served, watch until `stop`, then end everything.

        Raises StartError, tritonserver.ServerMissing, models.ModelsError, state.AlreadyRunning, alias.AliasError, or
        what Redis's start raises.
        """
        installation = tritonserver.find()
        with state.lock(self._home):
            aside = swap.recover(self._home)
            if aside is not None:
                self._report("a restore that was interrupted has been undone")
                for path in aside:
                    self._report(f"what had been made since in place of something that it had moved is in {path}")
            cleared = preflight.clear_leftovers(self._home)
            preflight.check_ports(self._settings, preflight.GONE_S if cleared else 0.0)
            repository = self._settings.model_repository
            newest = {name: models.get(repository, name).newest.number for name in self._served}
            self._wanted = models.with_engines(repository, newest)
            for name, number in self._wanted.items():
                preflight.check_engine(self._settings, name, number)
                if name not in newest:  # a graph
                    self._report(f"verifying {name} version {number}")
                await self._check_graph(name, number)
            self._triton = Triton(self._triton_url, Deadlines(heartbeat_s=self._settings.heartbeat_timeout_s))
            self._installation = installation
            self._models = ModelWatch(
                self._settings, self._triton, lambda: self._children["triton"], self._triton_lives,
                self._restart_triton, self._write_state, self._report, self._check_graph,
            )  # fmt: skip
            try:
                if not await self._start():
                    return
                ready(self._write_state())
                await self._watch()
            finally:
                await self._shut_down()

    async def _start(self) -> bool:
        """Start the children. False when `stop` was called meanwhile; raises StartError when not ready."""
        url = self._settings.redis_url
        if url is None:
            self._report("starting Redis")
            self._redis = EmbeddedRedis(self._home, max_bytes=self._settings.redis_max_bytes)
            self._children["redis"] = await self._redis.start(self._logs / "redis.log")
            url = self._redis.url
        self._redis_url = url
        modelset.write(self._home, self._wanted)
        self._report(f"starting Triton with {', '.join(self._served)}")
        await self._start_triton()
        for name in self._wanted:
            if not await self._model_loads(name):
                return False
        await self._note_versions()
        self._report("starting the gateway")
        await self._start_gateway()
        return await self._until(self._gateway_ready, "gateway", "the gateway did not become ready")

    async def _check_graph(self, name: str, number: int) -> None:
        """Raises StartError. In a thread, because a graph may be large."""
        await asyncio.to_thread(preflight.check_graph, self._settings, name, number, self._refusal)

    async def _note_versions(self) -> None:
        """What was loaded is what comes back after a crash, even if an export has published a newer version since."""
        with contextlib.suppress(TruthGPTError, models.ModelsError):
            index = await self._triton.index()
            loaded = {name: int(index[name][0]) for name in self._served if name in index}
            wanted = models.with_engines(self._settings.model_repository, loaded)
            modelset.write(self._home, modelset.read(self._home) | wanted)

    async def _model_loads(self, name: str) -> bool:
        """Wait until a model answers. A server that crashes meanwhile gets a second attempt, no third.

        Seen on the real server: where the machine stands still for a second while a stub starts, a lock that they
        share times out, and the server aborts.
        """
        failure = f"the model {name} did not load"

        async def answers() -> bool:
            return await self._models.answers(name)

        async def refused() -> str | None:
            return await self._load_failure(name)

        try:
            return await self._until(answers, "triton", failure, refused)
        except StartError:
            ended = self._children["triton"].returncode
            if ended is None or ended >= 0:
                raise
            self._report(f"Triton was ended by signal {-ended} while it loaded {name}: starting it once more")
            await self._restart_triton()
            return await self._until(answers, "triton", failure, refused)

    async def _start_triton(self, without: Collection[str] = ()) -> None:
        """Start it with the models that it would load by itself in the version that is to be served.

        The others are loaded by the model watch, which can name a version.
        """
        wanted = {name: number for name, number in modelset.read(self._home).items() if name not in without}
        by_itself = {
            entry.name: entry.versions[: ENGINE_VERSIONS if entry.newest.graph_only else 1]
            for entry in models.read(self._settings.model_repository)
        }
        names = [name for name, number in wanted.items() if number in {v.number for v in by_itself.get(name, ())}]
        argv = tritonserver.command(self._installation, self._settings, names)
        env = tritonserver.environment(self._installation)
        self._children["triton"] = await Child.start("triton", argv, env, self._logs / "triton.log")

    async def _start_gateway(self) -> None:
        # it opens its log by itself, and so it rotates it without losing a line; what else it prints goes there, too
        log = (self._settings.log_file or self._logs / "gateway.log").absolute()
        given = {"home": self._home, "redis_url": self._redis_url, "model": self._model, "log_file": log}
        env = {**os.environ, **self._settings.child_environ(**given)}
        argv = [sys.executable, "-m", "orchestrator.parent"]
        self._children["gateway"] = await Child.start("gateway", argv, env, log)

    async def _until(
        self, check: Callable[[], Awaitable[bool]], child: str, failure: str,
        refused: Callable[[], Awaitable[str | None]] | None = None,
    ) -> bool:  # fmt: skip
        """Poll an async check until it holds. False when stopping; raises StartError at the deadline, when the child
        ends, or when `refused` has a reason.
        """
        deadline = time.monotonic() + self._settings.start_timeout_s
        while not await check():
            if self._stopping.is_set():
                return False
            process = self._children[child]
            reason = await refused() if refused is not None else None
            if process.returncode is not None or reason or time.monotonic() > deadline:
                why = reason or process.last_lines() or "it said nothing"
                raise StartError(
                    f"{failure}: {why}", f"the whole log is {process.log}; `truthgpt doctor` looks for common causes"
                )
            await asyncio.sleep(0.1)
        return True

    async def _load_failure(self, name: str) -> str | None:
        """Why Triton could not load a model, once it has tried."""
        with contextlib.suppress(TruthGPTError):
            if (await self._triton.index()).get(name, ("", ""))[1] == "UNAVAILABLE":
                return self._children["triton"].last_lines(2) or "Triton gives no reason"
        return None

    async def _triton_lives(self) -> bool:
        return await self._get(f"{self._triton_url}/v2/health/live", 1.0) == 200

    async def _get(self, url: str, timeout_s: float) -> int | None:
        """Status of a GET, or None when there was no answer in time."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
                session.get(url) as answer,
            ):
                return answer.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def _gateway_ready(self) -> bool:
        return await self._get(f"{self._gateway_url}/health/ready", 1.0) == 200

    @property
    def _gateway_url(self) -> str:
        return _url(self._settings.host, self._settings.http_port)

    async def _watch(self) -> None:
        """Mend what breaks until `stop` is called."""
        watchers = [asyncio.create_task(self._models.run()), asyncio.create_task(self._watch_gateway())]
        watchers.append(asyncio.create_task(self._watch_logs()))
        if self._redis is not None:
            watchers.append(asyncio.create_task(self._watch_redis()))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([*watchers, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # a watcher ends only by a fault of ours: do not go on unwatched
        finally:
            for task in (*watchers, stopping):
                task.cancel()
            await asyncio.gather(*watchers, stopping, return_exceptions=True)

    async def _restart_triton(self) -> None:
        await self._children["triton"].kill()
        tritonserver.sweep(self._prefix, kill=True)
        damaged = []
        for name, number in modelset.read(self._home).items():
            try:
                await self._check_graph(name, number)
            except StartError:  # the model watch says why, when it tries to load it
                damaged.append(name)
        await self._start_triton(without=damaged)

    async def _watch_gateway(self) -> None:
        faults, good_at = Faults(), time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            child = self._children["gateway"]
            if child.returncode is None:
                if await self._get(f"{self._gateway_url}/health/live", 2.0) == 200:
                    good_at = time.monotonic()
                if time.monotonic() - good_at < GATEWAY_SILENT_S:
                    continue
            self._report("the gateway does not answer: starting it again")
            await child.kill()
            await faults.pause()
            await self._start_gateway()
            good_at = time.monotonic()
            self._write_state()

    async def _watch_redis(self) -> None:
        # Only a Redis that is gone is replaced: a stalled one keeps its data, and no request waits for it.
        faults = Faults()
        while self._redis is not None:
            await self._children["redis"].wait()
            self._report("Redis ended: starting it again")
            await faults.pause()
            try:
                self._children["redis"] = await self._redis.start(self._logs / "redis.log")
            except (RedisMissing, TimeoutError, OSError) as error:  # a stack without Redis still answers
                self._report(f"Redis does not come back: {error}")
                continue
            self._write_state()

    async def _watch_logs(self) -> None:
        """Rotate the logs of programs that cannot do it by themselves, and that of this process."""
        while True:
            failed = await asyncio.to_thread(self._trim_logs)
            for name, error in failed.items():
                self._report(f"{name} cannot be rotated: {error}")
            await asyncio.sleep(LOGS_FAILED_S if failed else LOGS_S)

    def _trim_logs(self) -> dict[str, OSError]:
        """Those that cannot be rotated: the stack goes on with a log that grows.

        All in one call: a pool that is asked again at once may start one more thread for it.
        """
        failed = {}
        for name in ("triton.log", "redis.log", "supervisor.log"):
            try:
                rotation.trim(self._logs / name, self._settings.log_max_bytes, self._settings.log_files)
            except OSError as error:
                failed[name] = error
        return failed

    def _write_state(self) -> state.State:
        settings = self._settings
        now = state.State(
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            started=self._started,
            http=self._gateway_url,
            grpc=_address(settings.host, settings.grpc_port) if settings.grpc else "",
            ops=_url(settings.ops_host, settings.ops_port),
            triton_http=self._triton_url,
            triton_grpc=f"127.0.0.1:{settings.triton_grpc_port}",
            redis=self._redis_url,
            model=self._model,
            shm_prefix=self._prefix,
            processes={name: child.pid for name, child in self._children.items()},
        )
        state.write(self._home, now)
        return now

    async def _shut_down(self) -> None:
        """In the order in which requests flow, so that nothing is cut off below a request that is being drained."""
        self._report("stopping")
        for name, grace_s in (("gateway", self._settings.drain_s + GATEWAY_END_S), ("triton", 7.0), ("redis", 5.0)):
            child = self._children.get(name)
            if name == "triton":
                await self._triton.close()  # a server does not exit while a connection to it is open
            if child is None:
                continue
            if name == "triton":
                await self._end_stubs(child, grace_s)
                grace_s = 0.1  # nothing is left in it; by itself it would look only once a second
            await child.stop(grace_s)
        tritonserver.sweep(self._prefix, kill=True)
        alias.clear(self._home)
        modelset.clear(self._home)
        state.clear(self._home)

    async def _end_stubs(self, server: Child, grace_s: float) -> None:
        """Ask the server to end and wait until its models have; with a dead or stopped stub they never would."""
        server.terminate()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and server.returncode is None:
            stubs = tritonserver.stubs(server.pid)
            if not stubs or not all(runs(stub.pid) for stub in stubs):
                return
            await asyncio.sleep(0.05)


def _url(host: str, port: int) -> str:
    return f"http://{_address(host, port)}"


def _address(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (compared, not bound)
    return f"{f'[{host}]' if ':' in host else host}:{port}"
