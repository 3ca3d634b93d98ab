"""Which models are served and whether each one answers.

Triton says ready for ever once its stub process is dead or stopped, so each model is asked itself: a heartbeat that the
stub answers at once even under load, an encoder's between two batches. Only a model without a heartbeat is taken at
Triton's word. A model that turns unready takes its running streams with it: none waits for a deadline. One that
answered until it left the index was unloaded: it is forgotten at once, and what runs on it may end, as Triton lets it.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.domain import Abilities, Model
from orchestrator.errors import ModelNotFound, Overloaded, TruthGPTError, UpstreamUnavailable
from orchestrator.triton import Attendance, Heartbeat, ModelConfig, Triton, is_engine

log = logging.getLogger(__name__)

INDEX_INTERVAL_S = 2.0
UNLOADED_S = 0.2  # for Triton to say that a model was unloaded; in time it says so within milliseconds
ASK_AGAIN_S = 1.0  # an unknown model makes the index be read at once, at most this often
FORGET_S = 10.0  # a model that left the index's READY rows but is still in it is being reloaded: 503, not 404
ON_CPU = "ready, on the CPU: its device failed; reload the model once that is mended"
FRESH_S = 0.5  # twice the longest silence of a live stream


@dataclass
class Served:
    """One model's state. `since` is monotonic time of the last change of readiness, `reason` why it is not ready.

    `configured` is false until the entry's own parameters were read, anew after each load. `judged` is false while
    nobody knows yet whether a model answers that was loaded beside others.
    """

    model: Model
    reason: str = "no heartbeat yet"
    configured: bool = False
    config: ModelConfig | None = None  # what was read
    judged: bool = True
    since: float = 0.0
    beat: Heartbeat | None = None
    heard_at: float = 0.0  # loop time of the last bytes of an answer that has ended
    gone_at: float | None = None
    attending: set[Attendance] = field(default_factory=set)
    renewing: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None

    @property
    def fallback(self) -> bool:
        """Whether it runs on the CPU because its device failed."""
        return self.beat is not None and self.beat.fallback

    @property
    def detail(self) -> str:
        """One line for people: ready or why not, and what is not as it should be."""
        return self.reason or (ON_CPU if self.fallback else "ready")

    def fail(self, error: TruthGPTError) -> None:
        """End its running streams with this error."""
        for attendance in tuple(self.attending):
            attendance.fail(error)


class Attending:
    """The context in which a stream is tied to its model's health."""

    __slots__ = ("_served", "_attendance")

    def __init__(self, served: Served) -> None:
        self._served, self._attendance = served, Attendance(served.model.tells_cached)

    def __enter__(self) -> Attendance:
        self._served.attending.add(self._attendance)
        return self._attendance

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._served.attending.discard(self._attendance)
        if kind is None:  # of a dead process Triton itself writes, and that is no sign of life
            self._served.heard_at = max(self._served.heard_at, self._attendance.heard_at)


class Health:
    """Watches Triton. `run()` is the watch; everything else answers from what it last saw."""

    def __init__(
        self, triton: Triton, *, interval_s: float, engine_stall_s: float, drain_s: float = 10.0, joins: bool = False
    ) -> None:  # fmt: skip
        """`joins`: others serve already, and none of its models is judged before it has answered."""
        self._triton = triton
        self._joins = joins
        self._interval_s = interval_s
        self._engine_stall_s = engine_stall_s
        self._drain_s = drain_s
        self._served: dict[str, Served] = {}
        self._reading = asyncio.Lock()
        self._read_at = -ASK_AGAIN_S
        self.triton_up = False
        self.answered_at = -math.inf  # loop time when the last heartbeat was asked that was answered
        self.on_lost: list[Callable[[float, str], None]] = []  # with when that was asked which it did not answer
        self.on_ready: list[Callable[[str], None]] = []  # called with the name of a model that has turned ready
        self.on_gone: list[Callable[[str], None]] = []  # and of one that is not served any more

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
        """Something is served and all of it answers. A model that has just been loaded beside others does not count."""
        judged = [served.model.ready for served in self._served.values() if served.judged]
        return self.triton_up and bool(judged) and all(judged)

    def known(self, name: str) -> Served | None:
        """The state of a model that was seen, None of another."""
        return self._served.get(name)

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

    async def renew(self, known: Model) -> Model:
        """Read anew what is served in place of this model, of which another version has answered: it is being reloaded,
        and neither the index nor a heartbeat has said so yet. Raises UpstreamUnavailable.
        """
        served = self.require(known.name)
        async with served.renewing:  # whoever waited here finds the answer of the one before
            if served.model.version == known.version:
                if served.beat is None or not served.beat.digest:  # its heartbeat would not tell of another version
                    async with self._reading:
                        await self._read_index()
                served.configured = False
                await self._beat_once(served)
        return self.require(known.name).model

    def attend(self, name: str) -> Attending:
        """Tie a stream to its model's health for as long as the context lasts. Raises UpstreamUnavailable."""
        served = self.require(name)
        if not served.model.ready:
            raise UpstreamUnavailable(f"{name} is not ready: {served.reason}")
        return Attending(served)

    def fail_all(self, error: TruthGPTError) -> None:
        """End every running stream with this error."""
        for served in self._served.values():
            served.fail(error)

    async def _look_again(self, name: str) -> None:
        async with self._reading:  # whoever waited here finds the answer of the one before
            if time.monotonic() - self._read_at >= ASK_AGAIN_S:
                await self._read_index()
        served = self._served.get(name)
        if served is not None and served.beat is None:  # just found: let its first heartbeat come in
            await self._beat_once(served)

    async def _read_index(self) -> None:
        self._read_at, asked_at = time.monotonic(), asyncio.get_running_loop().time()
        try:
            index = await self._triton.index()
        except TruthGPTError as error:
            if self.triton_up:
                log.warning("Triton does not answer: %s", error)
                self._lost(asked_at, error)
            self.triton_up = False
            return  # what was known stays known; its heartbeats say that it does not answer
        self.triton_up = True
        now, others = time.monotonic(), self._joins or bool(self._served)
        for name, (version, state) in index.items():
            if is_engine(name, index):  # nobody asks it but the model in front of it
                continue
            known = self._served.get(name)
            if state == "READY" and known is None:
                model = Model(name, version, int(time.time()), ready=False)
                self._served[name] = served = Served(model, judged=not others)
                watch = self._watch(served)
                # outside of the request that happened to ask for this model first
                served.task = asyncio.create_task(watch, name=f"heartbeat {name}", context=contextvars.Context())
            elif state == "READY" and known is not None:
                known.gone_at = None
                if known.model.version != version:
                    known.configured = False
                    if known.beat is None or not known.beat.digest:  # else its heartbeat tells both in one
                        known.model = dataclasses.replace(known.model, version=version)
            elif known is not None and known.gone_at is None:
                known.gone_at = now
        for name, served in list(self._served.items()):
            reloading = name in index and (index[name][1] == "LOADING" or now - (served.gone_at or now) < FORGET_S)
            if (name not in index or served.gone_at is not None) and not reloading:
                self._forget(served)

    def _forget(self, served: Served) -> None:
        """No new request finds it. Its streams end by themselves, or are ended when the time to drain is over."""
        log.info("%s is not served any more", served.model.name)
        self._served.pop(served.model.name, None)
        if served.attending:
            error = UpstreamUnavailable(f"{served.model.name} was unloaded")
            asyncio.get_running_loop().call_later(self._drain_s, served.fail, error)
        if served.task is not None:
            served.task.cancel()
        for call in self.on_gone:
            call(served.model.name)

    async def _unloaded(self, served: Served) -> bool:
        """Whether a model that answered until now was unloaded on purpose, and is not being loaded again."""
        try:
            async with asyncio.timeout(UNLOADED_S):  # whoever runs on a dead process is waiting for its verdict
                index = await self._triton.index()
        except (TruthGPTError, TimeoutError):
            return False
        return index.get(served.model.name, ("", ""))[1] not in ("READY", "LOADING")

    async def _watch(self, served: Served) -> None:
        while True:
            await self._beat_once(served)
            await asyncio.sleep(self._interval_s)

    async def _beat_once(self, served: Served) -> None:
        asked_at = asyncio.get_running_loop().time()
        try:
            config = served.config if served.configured else None
            if config is None:
                config = await self._configure(served)
            fell_back = served.fallback
            served.beat = await self._triton.beat(served.model.name, config, self._engine_stall_s)
            if served.fallback and not fell_back:
                log.warning("%s runs on the CPU: its device failed", served.model.name)
            if served.beat is not None:
                digest, version = served.beat.digest, served.beat.version or served.model.version
                if digest and (digest, version) != (served.model.digest, served.model.version):
                    await self._configure(served)  # another entry than the one whose parameters were read
                    served.model = dataclasses.replace(served.model, digest=digest, version=version)
        except Overloaded:  # its queue is full of others' requests, and Triton itself says so: it lives
            log.debug("the queue of %s has no room for a heartbeat", served.model.name)
            self.answered_at = max(self.answered_at, asked_at)
            return
        except TruthGPTError as error:
            silent = isinstance(error.__cause__, TimeoutError)
            if served.model.ready and not silent and await self._unloaded(served):
                self._forget(served)
            elif not (silent and self._heard_since(served, asked_at)):
                if served.model.ready:
                    self._lost(asked_at, error)
                self._unready(served, str(error))
            return
        except Exception:
            log.exception("the heartbeat of %s failed", served.model.name)
            self._unready(served, "its heartbeat failed")
            return
        self.answered_at = max(self.answered_at, asked_at)
        if served.beat is not None and served.beat.busy and served.beat.step_age_s > self._engine_stall_s:
            self._unready(served, f"the engine has been in one step for {served.beat.step_age_s:.0f} s")
        elif not served.model.ready:
            log.info("%s is ready", served.model.name)
            served.model = dataclasses.replace(served.model, ready=True)
            served.reason, served.since, served.judged = "", time.monotonic(), True
            for call in self.on_ready:
                call(served.model.name)

    def _lost(self, asked_at: float, error: TruthGPTError) -> None:
        """Triton was to answer and did not, if that is what the error says."""
        if isinstance(error, UpstreamUnavailable) and (error.server or isinstance(error.__cause__, TimeoutError)):
            for call in self.on_lost:
                call(asked_at, str(error))

    def _heard_since(self, served: Served, asked_at: float) -> bool:
        """Whether a stream was written to lately: the stub lives, the machine is only too busy for its heartbeat."""
        recent = max(asked_at, asyncio.get_running_loop().time() - FRESH_S) if served.model.generates else asked_at
        return served.heard_at > recent or any(attendance.heard_at > recent for attendance in served.attending)

    async def _configure(self, served: Served) -> ModelConfig:
        config = await self._triton.model_config(served.model.name)
        served.config = config
        facts = {row.name: getattr(config, row.name) for row in dataclasses.fields(Abilities)}
        served.model = dataclasses.replace(served.model, seen=True, **facts)
        served.configured = True
        return config

    def _unready(self, served: Served, reason: str) -> None:
        if served.model.ready:
            log.warning("%s is not ready: %s", served.model.name, reason)
            served.since = time.monotonic()
        served.reason, served.configured, served.judged = reason, False, True
        served.model = dataclasses.replace(served.model, ready=False)
        served.fail(UpstreamUnavailable(f"{served.model.name} turned unready: {reason}"))
