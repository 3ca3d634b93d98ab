"""Starts Triton, Redis and the gateway, keeps them alive, and stops them without leaving anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence

import psutil

from orchestrator import models, rotation
from orchestrator.client import GatewayClient, GatewayError
from orchestrator.errors import TruthGPTError
from orchestrator.local import alias, lone, modelset, places, preflight, state, swap, tritonserver
from orchestrator.local.modelwatch import Faults
from orchestrator.local.places import Place
from orchestrator.local.preflight import StartError
from orchestrator.local.process import Child, kill_group
from orchestrator.local.redisserver import EmbeddedRedis, RedisMissing
from orchestrator.local.servers import Report, Server
from orchestrator.local.waiting import Patience, status_of, together
from orchestrator.settings import Settings

POLL_S = 0.4
GATEWAY_SILENT_S = 10.0
GATEWAY_END_S = 8.0  # more than its parent process waits for its workers once they have drained
REDIS_END_S = 5.0
ASK_S = 3.0
LOGS_S = 5.0
LOGS_FAILED_S = 300.0


class Supervisor:
    """One home's stack. `run` returns when `stop` is called; `report` gets one line an event, for people.

    `served` are the models to start with, the default one first; later ones come and go with the model set. `refusal`
    is asked of each before Triton loads it, for what no backend of ours checks. Where the settings name servers to use
    there are none of its own, and `served` is empty.
    """

    def __init__(self, settings: Settings, served: Sequence[str], report: Report, refusal: preflight.Refusal) -> None:
        self._settings, self._served, self._report, self._refusal = settings, tuple(served), report, refusal
        self._model = self._served[0] if self._served else settings.model
        self._home = settings.home.resolve()
        self._logs = self._home / "logs"
        self._prefix = tritonserver.shm_prefix(settings.home)
        self._places = places.own(settings)
        self._servers: list[Server] = []
        self._children: dict[str, Child] = {}
        self._stopping = asyncio.Event()
        self._patience = Patience(settings.start_timeout_s, self._stopping)
        self._redis: EmbeddedRedis | None = None
        self._started = time.time()

    def stop(self) -> None:
        """Ask `run` to drain and return; may be called from a signal handler."""
        self._stopping.set()

    def hurry(self) -> None:
        """End what a stop waits for; may be called from a signal handler. `run` cleans up behind it as always."""
        for server in self._servers:
            server.kill()
        gateway = self._children.get("gateway")
        if gateway is not None and gateway.returncode is None:
            kill_group(gateway.pid)

    async def run(self, ready: Callable[[state.State], None]) -> None:
        """Start everything, call `ready` once requests can be served, watch until `stop`, then end everything.

        Raises StartError, tritonserver.ServerMissing, models.ModelsError, state.AlreadyRunning, alias.AliasError, or
        what Redis's start raises.
        """
        installation = tritonserver.find() if self._places else None
        with state.lock(self._home):
            aside = swap.recover(self._home)
            if aside is not None:
                self._report("a restore that was interrupted has been undone")
                for path in aside:
                    self._report(f"what had been made since in place of something that it had moved is in {path}")
            preflight.check_servers(self._settings)
            cleared = preflight.clear_leftovers(self._home)
            preflight.check_ports(self._settings, preflight.GONE_S if cleared else 0.0)
            if installation is not None:
                await self._choose_versions()
                self._servers = [
                    Server(
                        self._settings, installation, place, number, self._reporting(place), self._check_graph,
                        self._write_state,
                    )
                    for number, place in enumerate(self._places, start=1)
                ]  # fmt: skip
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
        if not await self._start_servers():
            return False
        self._report("starting the gateway")
        await self._start_gateway()
        if not await self._gateway_becomes_ready():
            return False
        if not self._servers:
            self._model = await asyncio.to_thread(self._default_elsewhere)
        return True

    async def _gateway_becomes_ready(self) -> bool:
        """False when stopping. Raises StartError."""
        failure = "the gateway did not become ready"
        try:
            return await self._patience.until(self._gateway_ready, lambda: self._children["gateway"], failure)
        except StartError as error:
            if self._servers or self._children["gateway"].returncode is not None:
                raise
            raise StartError(
                f"no model of Triton at {self._settings.triton_urls} answers",
                f"see that it runs there and has a model loaded; the whole log is {self._children['gateway'].log}",
            ) from error

    async def _start_servers(self) -> bool:
        """All at the same time; True once every model answers on each of them."""
        if not self._servers:
            self._report(f"using Triton at {self._settings.triton_urls}")
            return True
        modelset.write(self._home, self._wanted)
        what = "Triton" if len(self._servers) == 1 else f"{len(self._servers)} Triton servers"
        self._report(f"starting {what} with {', '.join(self._served)}")
        for server in self._servers:
            await server.start()
        if not await together(*(server.loads(self._wanted, self._patience) for server in self._servers)):
            return False
        await self._note_versions()
        return True

    def _default_elsewhere(self) -> str:
        """Of what servers of others have: the model of the settings, else the first that generates, else the first."""
        with contextlib.suppress(GatewayError):
            rows = GatewayClient(self._gateway_url, ASK_S).health().get("models") or []
            operations = {str(row["name"]): row.get("operation") for row in rows if row.get("ready")}
            generating = [name for name, operation in operations.items() if operation == "generate"]
            if operations and self._model not in operations:
                return [*generating, *operations][0]
        return self._model

    async def _choose_versions(self) -> None:
        """Which version of each model, and of its graph, is to be served. Raises StartError, models.ModelsError."""
        repository = self._settings.model_repository
        newest = {name: models.get(repository, name).newest.number for name in self._served}
        self._wanted = models.with_engines(repository, newest)
        for name, number in self._wanted.items():
            preflight.check_engine(self._settings, name, number)
            if name not in newest:  # a graph
                self._report(f"verifying {name} version {number}")
            await self._check_graph(name, number)

    def _reporting(self, place: Place) -> Report:
        """What is said of one server names it, where there are others."""
        return self._report if len(self._places) == 1 else lambda text: self._report(f"{place.name}: {text}")

    async def _check_graph(self, name: str, number: int) -> None:
        """Raises StartError. In a thread, because a graph may be large."""
        await asyncio.to_thread(preflight.check_graph, self._settings, name, number, self._refusal)

    async def _note_versions(self) -> None:
        """What was loaded is what comes back after a crash, even if an export has published a newer version since."""
        with contextlib.suppress(TruthGPTError, models.ModelsError):
            index = await self._servers[0].triton.index()
            loaded = {name: int(index[name][0]) for name in self._served if name in index}
            wanted = models.with_engines(self._settings.model_repository, loaded)
            modelset.write(self._home, modelset.read(self._home) | wanted)

    async def _start_gateway(self) -> None:
        # it opens its log by itself, and so it rotates it without losing a line; what else it prints goes there, too
        log = (self._settings.log_file or self._logs / "gateway.log").absolute()
        given: dict[str, object] = {"home": self._home, "redis_url": self._redis_url, "model": self._model}
        given["log_file"] = log
        if len(self._places) > 1:
            given["triton_urls"] = ",".join(place.http for place in self._places)
        env = {**os.environ, **self._settings.child_environ(**given)}
        argv = [sys.executable, "-m", "orchestrator.parent"]
        self._children["gateway"] = await Child.start("gateway", argv, env, log)

    async def _gateway_ready(self) -> bool:
        return await status_of(f"{self._gateway_url}/health/ready", 1.0) == 200

    @property
    def _gateway_url(self) -> str:
        return lone.url(self._settings.host, self._settings.http_port)

    async def _watch(self) -> None:
        """Mend what breaks until `stop` is called."""
        watchers = [asyncio.create_task(server.watch()) for server in self._servers]
        watchers += [asyncio.create_task(self._watch_gateway()), asyncio.create_task(self._watch_logs())]
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

    async def _watch_gateway(self) -> None:
        faults, good_at = Faults(), time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            child = self._children["gateway"]
            if child.returncode is None:
                if await status_of(f"{self._gateway_url}/health/live", 2.0) == 200:
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
        for name in (*(place.log for place in self._places), "redis.log", "supervisor.log"):
            try:
                rotation.trim(self._logs / name, self._settings.log_max_bytes, self._settings.log_files)
            except OSError as error:
                failed[name] = error
        return failed

    def _write_state(self) -> state.State:
        settings = self._settings
        processes = {name: child.pid for name, child in self._children.items()}
        processes |= {server.place.name: server.process.pid for server in self._servers}
        first = self._places[0] if self._places else None
        now = state.State(
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            started=self._started,
            http=self._gateway_url,
            grpc=lone.address(settings.host, settings.grpc_port) if settings.grpc else "",
            ops=lone.url(settings.ops_host, settings.ops_port),
            triton_http=first.http if first is not None else settings.triton_urls or "",
            triton_grpc=first.grpc if first is not None else "",
            redis=self._redis_url,
            model=self._model,
            shm_prefix=first.shm_prefix if first is not None else self._prefix,
            processes=processes,
            servers=self._places,
        )
        state.write(self._home, now)
        return now

    async def _shut_down(self) -> None:
        """In the order in which requests flow, so that nothing is cut off below a request that is being drained."""
        self._report("stopping")
        await self._end("gateway", self._settings.drain_s + GATEWAY_END_S)
        await asyncio.gather(*(server.stop() for server in self._servers))
        await self._end("redis", REDIS_END_S)
        tritonserver.sweep(self._prefix, kill=True)
        alias.clear(self._home)
        modelset.clear(self._home)
        state.clear(self._home)

    async def _end(self, name: str, grace_s: float) -> None:
        child = self._children.get(name)
        if child is not None:
            await child.stop(grace_s)
