"""Keeps the models of a home answering: asks each one, and reloads it, or starts Triton again, when it does not.

What is to be served stands in the model set and may change at any time. A model that does not come back never takes
the others with it: Triton is started again only for its own faults, or when nothing else answers anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from orchestrator import models
from orchestrator.errors import Overloaded, TruthGPTError
from orchestrator.local import healing, modelset, tritonserver
from orchestrator.local.healing import Action
from orchestrator.local.places import Place
from orchestrator.local.preflight import StartError
from orchestrator.local.process import Child, runs
from orchestrator.settings import Settings
from orchestrator.triton import Repository, Triton
from orchestrator.triton.repository import ENGINE, LOADING, READY

POLL_S = 0.4
BEATS_S = 0.2  # what a look waits for the answers; one that takes longer is seen by a later look
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
    `asked`: whether it answers, while that is not known yet.
    """

    name: str
    good_at: float
    lost: bool = False
    due_at: float | None = None
    patient_until: float = 0.0
    processes: int = 0
    faults: Faults = field(default_factory=Faults)
    mending: asyncio.Task[None] | None = None
    asked: asyncio.Task[bool] | None = None

    def tasks(self) -> list[asyncio.Task[Any]]:
        return [task for task in (self.mending, self.asked) if task is not None]

    def forget(self) -> None:
        """Cancel what was asked: the answer would be about what is no more."""
        if self.asked is not None:
            self.asked.cancel()
            self.asked = None


class ModelWatch:
    """Of one server, at `place`: `server` is the process of the moment, `restart` replaces it, `changed` is told that
    something was mended. `check` raises StartError where a version may not be loaded.
    """

    def __init__(
        self, settings: Settings, place: Place, triton: Triton, server: Callable[[], Child],
        alive: Callable[[], Awaitable[bool]], restart: Callable[[], Awaitable[None]], changed: Callable[[], object],
        report: Report, check: Callable[[str, int], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._settings, self._place, self._triton = settings, place, triton
        self._repository = Repository(triton, place.grpc)
        self._home: Path = settings.home.resolve()
        self._server, self._alive, self._restart = server, alive, restart
        self._changed, self._report, self._check = changed, report, check
        self._watched: dict[str, _Watched] = {}
        self._answering: set[str] = set()
        self._in_vain = False  # a reload has failed since the last look

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
            await self._cancel(self._watched.values())

    async def _cancel(self, several: Collection[_Watched]) -> None:
        """End what is under way for some models, and wait until it has ended."""
        tasks = [task for watched in several for task in watched.tasks()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for watched in several:
            watched.mending = watched.asked = None

    async def _look(self) -> None:
        await self._agree()
        in_vain, self._in_vain, now = self._in_vain, False, time.monotonic()
        loading = any(now < watched.patient_until for watched in self._watched.values())
        if in_vain and not self._answering and not loading:  # nobody is disturbed by a server that starts anew
            return await self._start_again()
        actions: dict[str, Action] = {}
        for watched, answers in await self._ask():
            if answers and (watched.processes < 2 or await self._complete(watched)):
                self._answering.add(watched.name)
                self._found_good(watched)
                continue
            if answers is not None:
                self._answering.discard(watched.name)
            if watched.mending is None:
                actions[watched.name] = await self._action(watched, pending=answers is None)
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
            self._mend(watched)

    def _mend(self, watched: _Watched) -> None:
        """Begin to reload a model, unless an operator is at work on it, or this watch on its graph: the next look sees
        what came of that.
        """
        model = watched.name.removesuffix(ENGINE)
        if any(
            other.mending is not None and other.name.removesuffix(ENGINE) == model for other in self._watched.values()
        ):
            return
        lock = contextlib.ExitStack()
        try:
            lock.enter_context(modelset.mending(self._home, watched.name))
        except modelset.Busy:
            return
        watched.due_at, watched.good_at = None, time.monotonic()
        watched.forget()
        self._answering.discard(watched.name)
        watched.mending = asyncio.create_task(self._reload(watched), name=f"reload {watched.name}")
        watched.mending.add_done_callback(lambda _: lock.close())  # also of a task that was cancelled before it began

    async def _ask(self) -> list[tuple[_Watched, bool | None]]:
        """Which models answer; None where that is not known yet.

        An encoder says nothing while it is in a batch, which may take long: no other model waits for it.
        """
        every = list(self._watched.values())
        for watched in every:
            if watched.mending is not None and watched.mending.done():
                watched.mending.result()  # a fault of ours is not passed over
                watched.mending = None
            if watched.asked is None and watched.mending is None:
                watched.asked = asyncio.create_task(self.answers(watched.name), name=f"ask {watched.name}")
        asked = {watched.asked for watched in every if watched.asked is not None}
        if asked:
            await asyncio.wait(asked, timeout=BEATS_S)
        found: list[tuple[_Watched, bool | None]] = []
        for watched in every:
            if watched.asked is not None and watched.asked.done():
                found.append((watched, watched.asked.result()))
                watched.asked = None
            else:
                found.append((watched, None))
        return found

    async def _complete(self, watched: _Watched) -> bool:
        """Whether a model has all of its processes: one that has died fails its share of the requests, while the others
        answer the heartbeats.

        How many there are to be, Triton says: config.pbtxt may have been changed and not been loaded since.
        """
        if self._running(watched) >= watched.processes:
            return True
        with contextlib.suppress(TruthGPTError):  # there may be fewer since it was asked last
            watched.processes = (await self._triton.model_config(watched.name)).processes
        return self._running(watched) >= watched.processes

    def _running(self, watched: _Watched) -> int:
        """How many processes run of the version to be served, or of what an administrator has loaded instead."""
        server, version = self._server().pid, modelset.read(self._home).get(watched.name)
        stubs = tritonserver.stubs(server, watched.name, version) or tritonserver.stubs(server, watched.name)
        return sum(runs(stub.pid) for stub in stubs)

    async def _agree(self) -> None:
        """Watch what is to be served, and nothing else."""
        wanted = modelset.read(self._home)
        gone = [self._watched.pop(name) for name in list(self._watched) if name not in wanted]
        self._answering &= wanted.keys()
        await self._cancel(gone)
        for name in wanted:
            if name not in self._watched:
                self._watched[name] = _Watched(name, time.monotonic())

    def _found_good(self, watched: _Watched) -> None:
        watched.good_at, watched.due_at, watched.patient_until = time.monotonic(), None, 0.0
        if watched.lost:
            watched.lost = False
            self._report(f"{watched.name} is ready again")
            self._changed()

    async def _action(self, watched: _Watched, pending: bool) -> Action:
        server, now = self._server(), time.monotonic()
        failing_s = now - watched.good_at
        if failing_s < healing.SUSPECT_S:
            return Action.WAIT
        if now < watched.patient_until and server.returncode is None and runs(server.pid):
            state = await self._state(watched.name)
            if state in (None, LOADING):
                return Action.WAIT
            if state == READY:  # patience was for its loading: it answers from now on
                watched.good_at, watched.patient_until = now, 0.0
                return Action.WAIT
        at_work = modelset.changed_now(self._home) == watched.name.removesuffix(ENGINE)
        if pending and at_work:
            watched.forget()  # what it was asked may be waiting for a version that goes
        # One that has no process cannot be told from one that has lost it, but that answers at once, if only an error.
        stub_runs = await self._complete(watched) and (pending or self._running(watched) > 0)
        server_runs = server.returncode is None and runs(server.pid)
        server_answers = server_runs and await self._alive()
        evidence = healing.Evidence(failing_s, stub_runs, server_runs, server_answers, pending)
        action = healing.decide(evidence)
        if action is Action.RELOAD and at_work:
            return Action.WAIT
        if action is Action.RELOAD and not watched.lost and await self._unloaded(watched.name):
            return Action.WAIT  # an administrator's doing: no fault ends like that
        return action

    async def _unloaded(self, name: str) -> bool:
        """Whether Triton was told to unload a model, which then waits for whoever did that to load it."""
        with contextlib.suppress(TruthGPTError):
            rows = await self._repository.rows(name)
            return any(row.unloaded for row in rows) and not any(row.state in (READY, LOADING) for row in rows)
        return False

    async def _state(self, name: str) -> str | None:
        """What Triton says of a model, empty where it does not have it; None while it does not answer."""
        with contextlib.suppress(TruthGPTError):
            return (await self._triton.index()).get(name, ("", ""))[1]
        return None

    async def _start_again(self) -> None:
        await self._cancel(self._watched.values())
        self._answering.clear()
        await self._restart()
        self._changed()
        now = time.monotonic()
        for watched in self._watched.values():
            watched.due_at, watched.lost = None, True
            watched.good_at, watched.patient_until = now, now + self._settings.start_timeout_s

    async def _reload(self, watched: _Watched) -> None:
        """Kill a model's stub, unload it, load the version that is to be served. Triton may refuse to go along."""
        name, limit_s = watched.name, self._settings.start_timeout_s
        try:
            version = modelset.read(self._home).get(name)
            if version is None:
                return
            config = models.get(self._settings.model_repository, name).pinned(version)
            await self._check(name, version)
            for stub in tritonserver.stubs(self._server().pid, name, version):
                with contextlib.suppress(psutil.NoSuchProcess):
                    stub.kill()
            with contextlib.suppress(TruthGPTError):  # it may not be loaded
                await self._repository.unload(name, UNLOAD_S)
            await self._repository.load(name, limit_s, config)
        except (TruthGPTError, models.ModelsError, StartError) as error:
            self._report(f"{name} could not be reloaded: {error}")
            watched.patient_until = 0.0
            self._in_vain |= not isinstance(error, StartError)  # what is damaged is so for another server, too
            return
        tritonserver.sweep(self._place.shm_prefix, kill=False)
        watched.good_at = time.monotonic()
        watched.patient_until = watched.good_at + limit_s
