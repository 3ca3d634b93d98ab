"""Keeps the models of a home answering: asks each one, and reloads it, or starts Triton again, when it does not.

What is to be served stands in the model set and may change at any time. A model that does not come back never takes
the others with it: Triton is started again only for its own faults, or when nothing else answers anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orchestrator import models
from orchestrator.errors import Overloaded, TruthGPTError
from orchestrator.local import healing, modelset, tritonserver
from orchestrator.local.healing import Action
from orchestrator.local.process import Child, runs
from orchestrator.settings import Settings
from orchestrator.triton import Repository, Triton
from orchestrator.triton.repository import LOADING, READY

POLL_S = 0.4
UNLOAD_S = 8.0
HEALTHY_AGAIN_S = 10.0  # after this long without a fault the back-off starts anew

Report = Callable[[str], None]


@dataclass
class Faults:
    """Consecutive faults of one part, for its back-off."""

    count: int = 0
    last: float = 0.0

    def pause_s(self) -> float:
        """Count one more: the seconds to wait before mending it."""
        now = time.monotonic()
        self.count = 1 if now - self.last > HEALTHY_AGAIN_S else self.count + 1
        self.last = now
        return healing.backoff_s(self.count)

    async def pause(self) -> None:
        await asyncio.sleep(self.pause_s())


@dataclass
class _Watched:
    """One model, of `processes` as Triton has loaded it. Monotonic times: `good_at` of the last good heartbeat or of
    what was done last, `due_at` before which nothing is done, `patient_until` before which a load may be under way.
    """

    name: str
    good_at: float
    lost: bool = False
    due_at: float | None = None
    patient_until: float = 0.0
    processes: int = 0
    faults: Faults = field(default_factory=Faults)
    mending: asyncio.Task[None] | None = None


class ModelWatch:
    """`server` is the process of the moment, `restart` replaces it, `changed` is told that something was mended."""

    def __init__(
        self, settings: Settings, triton: Triton, server: Callable[[], Child], alive: Callable[[], Awaitable[bool]],
        restart: Callable[[], Awaitable[None]], changed: Callable[[], object], report: Report,
    ) -> None:  # fmt: skip
        self._settings, self._triton = settings, triton
        self._repository = Repository(triton, f"127.0.0.1:{settings.triton_grpc_port}")
        self._home: Path = settings.home.resolve()
        self._server, self._alive, self._restart = server, alive, restart
        self._changed, self._report = changed, report
        self._watched: dict[str, _Watched] = {}
        self._answering: set[str] = set()

    async def answers(self, name: str) -> bool:
        """Whether a model answers its heartbeat, and no step of its engine takes for ever."""
        try:
            config = await self._triton.model_config(name)
            if name in self._watched:
                self._watched[name].processes = config.processes
            beat = await self._triton.beat(name, config, self._settings.engine_stall_s)
        except Overloaded:  # that its queue is full Triton itself says
            return True
        except TruthGPTError:
            return False
        return beat is None or not (beat.busy and beat.step_age_s > self._settings.engine_stall_s)

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                await asyncio.sleep(POLL_S)
                await self._look()
        finally:
            for watched in self._watched.values():
                if watched.mending is not None:
                    watched.mending.cancel()

    async def _look(self) -> None:
        self._agree()
        every = list(self._watched.values())
        good = await asyncio.gather(*(self.answers(watched.name) for watched in every))
        whole = [answers and await self._complete(watched) for watched, answers in zip(every, good, strict=True)]
        self._answering = {watched.name for watched, answers in zip(every, whole, strict=True) if answers}
        actions: dict[str, Action] = {}
        for watched in every:
            if watched.name in self._answering:
                self._found_good(watched)
            elif watched.mending is None or watched.mending.done():
                if watched.mending is not None and not watched.mending.cancelled():
                    watched.mending.result()  # a fault of ours is not passed over
                    watched.mending = None
                actions[watched.name] = await self._action(watched)
        now = time.monotonic()
        for name, action in actions.items():
            watched = self._watched[name]
            if action is Action.WAIT:
                continue
            if watched.due_at is None:
                self._report(f"{name} does not answer: {action.value}")
                watched.lost, watched.due_at = True, now + watched.faults.pause_s()
            if now < watched.due_at:
                continue
            if action is Action.RESTART:
                return await self._start_again()
            watched.due_at, watched.good_at = None, now
            watched.mending = asyncio.create_task(self._reload(watched), name=f"reload {name}")

    async def _complete(self, watched: _Watched) -> bool:
        """Whether a model has all of its processes: one that has died fails its share of the requests, while the others
        answer the heartbeats.

        How many there are to be, Triton says: config.pbtxt may have been changed and not been loaded since.
        """
        version = modelset.read(self._home).get(watched.name)
        if version is None or watched.processes < 2 or self._running(watched, version) >= watched.processes:
            return True
        with contextlib.suppress(TruthGPTError):  # there may be fewer since it was asked last
            watched.processes = (await self._triton.model_config(watched.name)).processes
        return self._running(watched, version) >= watched.processes

    def _running(self, watched: _Watched, version: int) -> int:
        return sum(runs(stub.pid) for stub in tritonserver.stubs(self._server().pid, watched.name, version))

    def _agree(self) -> None:
        """Watch what is to be served, and nothing else."""
        wanted = modelset.read(self._home)
        for name in [name for name in self._watched if name not in wanted]:
            gone = self._watched.pop(name)
            if gone.mending is not None:
                gone.mending.cancel()
        for name in wanted:
            if name not in self._watched:
                self._watched[name] = _Watched(name, time.monotonic())

    def _found_good(self, watched: _Watched) -> None:
        watched.good_at, watched.due_at, watched.patient_until = time.monotonic(), None, 0.0
        if watched.lost:
            watched.lost = False
            self._report(f"{watched.name} is ready again")
            self._changed()

    async def _action(self, watched: _Watched) -> Action:
        server, now = self._server(), time.monotonic()
        if now < watched.patient_until and server.returncode is None and not await self._left_out(watched.name):
            return Action.WAIT
        evidence = healing.Evidence(
            failing_s=now - watched.good_at,
            stub_runs=await self._complete(watched)
            and any(runs(stub.pid) for stub in tritonserver.stubs(server.pid, watched.name)),
            server_runs=server.returncode is None and runs(server.pid),
            server_answers=await self._alive(),
        )
        action = healing.decide(evidence)
        if action is Action.RELOAD and modelset.changed_now(self._home) == watched.name:
            return Action.WAIT  # somebody is at work on it
        if action is Action.RELOAD and not watched.lost and await self._unloaded(watched.name):
            return Action.WAIT  # an administrator's doing: no fault ends like that
        return action

    async def _unloaded(self, name: str) -> bool:
        """Whether Triton was told to unload a model, which then waits for whoever did that to load it."""
        with contextlib.suppress(TruthGPTError):
            rows = await self._repository.rows(name)
            return any(row.unloaded for row in rows) and not any(row.state in (READY, LOADING) for row in rows)
        return False

    async def _left_out(self, name: str) -> bool:
        """Whether Triton answers and neither has the model nor is loading it."""
        with contextlib.suppress(TruthGPTError):
            return (await self._triton.index()).get(name, ("", ""))[1] in ("", "UNAVAILABLE")
        return False

    async def _start_again(self) -> None:
        for watched in self._watched.values():
            if watched.mending is not None:
                watched.mending.cancel()
        await self._restart()
        self._changed()
        now = time.monotonic()
        for watched in self._watched.values():
            watched.mending, watched.due_at, watched.lost = None, None, True
            watched.good_at, watched.patient_until = now, now + self._settings.start_timeout_s

    async def _reload(self, watched: _Watched) -> None:
        """Kill a model's stub, unload it, load the version that is to be served. Triton may refuse to go along."""
        name, limit_s = watched.name, self._settings.start_timeout_s
        try:
            version = modelset.read(self._home).get(name)
            if version is None:
                return
            config = models.get(self._settings.model_repository, name).pinned(version)
            for stub in tritonserver.stubs(self._server().pid, name, version):
                with contextlib.suppress(psutil.NoSuchProcess):
                    stub.kill()
            with contextlib.suppress(TruthGPTError):  # it may not be loaded
                await self._repository.unload(name, UNLOAD_S)
            await self._repository.load(name, limit_s, config)
        except (TruthGPTError, models.ModelsError) as error:
            self._report(f"{name} could not be reloaded: {error}")
            if not self._answering:  # nobody is disturbed by a server that starts anew
                await self._start_again_for(watched)
            return
        tritonserver.sweep(tritonserver.shm_prefix(self._settings.home), kill=False)
        watched.good_at = time.monotonic()
        watched.patient_until = watched.good_at + limit_s

    async def _start_again_for(self, watched: _Watched) -> None:
        watched.mending = None  # it is this task: it is not to cancel itself
        await self._start_again()
