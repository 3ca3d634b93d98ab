"""Which models are served and whether each one answers.

Triton says ready for ever once its stub process is dead or stopped, so each model is asked itself: a heartbeat that the
stub answers at once even under load. Only a model of another backend is taken at Triton's word. A model that turns
unready takes its running streams with it: none waits for a deadline.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.domain import Model
from orchestrator.errors import ModelNotFound, TruthGPTError, UpstreamUnavailable
from orchestrator.triton import Attendance, Heartbeat, Triton

log = logging.getLogger(__name__)

INDEX_INTERVAL_S = 2.0
ASK_AGAIN_S = 1.0  # an unknown model makes the index be read at once, at most this often
FORGET_S = 10.0  # a model that left the index's READY rows but is still in it is being reloaded: 503, not 404
ON_CPU = "ready, on the CPU: its device failed; reload the model once that is mended"
FRESH_S = 0.5  # twice the longest silence of a live stream


@dataclass
class Served:
    """One model's state. `since` is monotonic time of the last change of readiness, `reason` why it is not ready.

    `configured` is false until the entry's own parameters were read, anew after each load.
    """

    model: Model
    reason: str = "no heartbeat yet"
    configured: bool = False
    since: float = 0.0
    beat: Heartbeat | None = None
    gone_at: float | None = None
    attending: set[Attendance] = field(default_factory=set)
    task: asyncio.Task[None] | None = None

    @property
    def fallback(self) -> bool:
        """Whether it runs on the CPU because its device failed."""
        return self.beat is not None and self.beat.fallback

    @property
    def detail(self) -> str:
        """One line for people: ready or why not, and what is not as it should be."""
        return self.reason or (ON_CPU if self.fallback else "ready")


class Attending:
    """The context in which a stream is tied to its model's health."""

    __slots__ = ("_served", "_attendance")

    def __init__(self, served: Served) -> None:
        self._served, self._attendance = served, Attendance()

    def __enter__(self) -> Attendance:
        self._served.attending.add(self._attendance)
        return self._attendance

    def __exit__(self, *raised: object) -> None:
        self._served.attending.discard(self._attendance)


class Health:
    """Watches Triton. `run()` is the watch; everything else answers from what it last saw."""

    def __init__(self, triton: Triton, *, interval_s: float, engine_stall_s: float) -> None:
        self._triton = triton
        self._interval_s = interval_s
        self._engine_stall_s = engine_stall_s
        self._served: dict[str, Served] = {}
        self._reading = asyncio.Lock()
        self._read_at = -ASK_AGAIN_S
        self.triton_up = False
        self.on_ready: list[Callable[[str], None]] = []  # called with the name of a model that has turned ready

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                try:
                    async with self._reading:
                        await self._read_index()
                except Exception:  # the watch must outlive any fault of its own, and may not claim readiness then
                    self.triton_up = False
                    log.exception("watching Triton failed")
                await asyncio.sleep(INDEX_INTERVAL_S if self.triton_up else min(self._interval_s, INDEX_INTERVAL_S))
        finally:
            for served in self._served.values():
                if served.task is not None:
                    served.task.cancel()

    @property
    def ready(self) -> bool:
        """Something is served and all of it answers."""
        return self.triton_up and bool(self._served) and all(served.model.ready for served in self._served.values())

    def served(self) -> list[Served]:
        """Every served model by name."""
        return [self._served[name] for name in sorted(self._served)]

    def serves(self, name: str) -> bool:
        """Whether a model of this name is served, ready or not."""
        return name in self._served

    async def find(self, name: str) -> Model:
        """A model that is served, ready or not. Raises ModelNotFound.

        While Triton is away, one that was never seen is taken to exist: nobody can say that it does not.
        """
        if name not in self._served:
            await self._look_again(name)
        served = self._served.get(name)
        if served is not None:
            return served.model
        if self.triton_up:
            raise ModelNotFound(name)
        return Model(name, "", 0, ready=False, chat=True)

    def require(self, name: str) -> Served:
        """A model that has been seen, ready or not. Raises UpstreamUnavailable."""
        served = self._served.get(name)
        if served is None:
            raise UpstreamUnavailable(f"{name} is gone" if self.triton_up else "Triton does not answer")
        return served

    def attend(self, name: str) -> Attending:
        """Tie a stream to its model's health for as long as the context lasts. Raises UpstreamUnavailable."""
        served = self.require(name)
        if not served.model.ready:
            raise UpstreamUnavailable(f"{name} is not ready: {served.reason}")
        return Attending(served)

    def fail_all(self, error: TruthGPTError) -> None:
        """End every running stream with this error."""
        for served in self._served.values():
            for attendance in tuple(served.attending):
                attendance.fail(error)

    async def _look_again(self, name: str) -> None:
        async with self._reading:  # whoever waited here finds the answer of the one before
            if time.monotonic() - self._read_at >= ASK_AGAIN_S:
                await self._read_index()
        served = self._served.get(name)
        if served is not None and served.beat is None:  # just found: let its first heartbeat come in
            await self._beat_once(served)

    async def _read_index(self) -> None:
        self._read_at = time.monotonic()
        try:
            index = await self._triton.index()
        except TruthGPTError as error:
            if self.triton_up:
                log.warning("Triton does not answer: %s", error)
            self.triton_up = False
            return  # what was known stays known; its heartbeats say that it does not answer
        self.triton_up = True
        now = time.monotonic()
        for name, (version, state) in index.items():
            known = self._served.get(name)
            if state == "READY" and known is None:
                self._served[name] = served = Served(Model(name, version, int(time.time()), ready=False))
                watch = self._watch(served)
                # outside of the request that happened to ask for this model first
                served.task = asyncio.create_task(watch, name=f"heartbeat {name}", context=contextvars.Context())
            elif state == "READY" and known is not None:
                known.gone_at = None
                if known.model.version != version:
                    known.model = dataclasses.replace(known.model, version=version)
                    known.configured = False
            elif known is not None and known.gone_at is None:
                known.gone_at = now
        for name, served in list(self._served.items()):
            reloading = name in index and (index[name][1] == "LOADING" or now - (served.gone_at or now) < FORGET_S)
            if (name not in index or served.gone_at is not None) and not reloading:
                del self._served[name]
                if served.task is not None:
                    served.task.cancel()

    async def _watch(self, served: Served) -> None:
        while True:
            await self._beat_once(served)
            await asyncio.sleep(self._interval_s)

    async def _beat_once(self, served: Served) -> None:
        asked_at = asyncio.get_running_loop().time()
        try:
            if not served.configured:
                await self._configure(served)
            if served.model.generates:
                fell_back, served.beat = served.fallback, await self._triton.heartbeat(served.model.name)
                if served.fallback and not fell_back:
                    log.warning("%s runs on the CPU: its device failed", served.model.name)
                digest = served.beat.digest or served.model.digest
                if digest != served.model.digest:  # another entry than the one whose parameters were read
                    await self._configure(served)
                    served.model = dataclasses.replace(served.model, digest=digest)
            else:
                await self._triton.model_ready(served.model.name)
        except TruthGPTError as error:
            if not (isinstance(error.__cause__, TimeoutError) and self._heard_since(served, asked_at)):
                self._unready(served, str(error))
            return
        except Exception:
            log.exception("the heartbeat of %s failed", served.model.name)
            self._unready(served, "its heartbeat failed")
            return
        if served.beat is not None and served.beat.busy and served.beat.step_age_s > self._engine_stall_s:
            self._unready(served, f"the engine has been in one step for {served.beat.step_age_s:.0f} s")
        elif not served.model.ready:
            log.info("%s is ready", served.model.name)
            served.model = dataclasses.replace(served.model, ready=True)
            served.reason, served.since = "", time.monotonic()
            for call in self.on_ready:
                call(served.model.name)

    def _heard_since(self, served: Served, asked_at: float) -> bool:
        """Whether a stream was written to lately: the stub lives, the machine is only too busy for its heartbeat."""
        recent = max(asked_at, asyncio.get_running_loop().time() - FRESH_S)
        return any(attendance.heard_at > recent for attendance in served.attending)

    async def _configure(self, served: Served) -> None:
        config = await self._triton.model_config(served.model.name)
        if not config.generates:
            served.beat = None
        served.model = dataclasses.replace(
            served.model, task=config.task, chat=config.chat, max_len=config.max_len, generates=config.generates
        )
        served.configured = True

    def _unready(self, served: Served, reason: str) -> None:
        if served.model.ready:
            log.warning("%s is not ready: %s", served.model.name, reason)
            served.since = time.monotonic()
        served.reason, served.configured = reason, False
        served.model = dataclasses.replace(served.model, ready=False)
        for attendance in tuple(served.attending):
            attendance.fail(UpstreamUnavailable(f"{served.model.name} turned unready: {reason}"))
