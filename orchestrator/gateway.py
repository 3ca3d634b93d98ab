"""The request path. No wire formats here, no Triton ones and no Redis commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from orchestrator.admission import Admission
from orchestrator.breaker import Breakers
from orchestrator.broadcast import Outcome, Put
from orchestrator.cache import encode_ticket, ticket
from orchestrator.context import handling
from orchestrator.domain import (
    Caller,
    Chunk,
    Encoded,
    EncodeRequest,
    GenerateRequest,
    InferRequest,
    InferResult,
    Model,
    Notes,
    Trace,
    changed,
)
from orchestrator.encoding import encoded
from orchestrator.errors import Draining, InternalError, PermissionDenied, Text, TruthGPTError, UpstreamError
from orchestrator.fleet import Fleet
from orchestrator.flights import Flights, alone
from orchestrator.generation import Generation, Ready, Source
from orchestrator.health import Served
from orchestrator.limiter import Limiter
from orchestrator.operations import fit, mismatch
from orchestrator.passage import Passage, Prepared, Prompt, Request, Sink, within
from orchestrator.screening import Screen
from orchestrator.tokens import Tokens
from orchestrator.upstream import Upstream

log = logging.getLogger(__name__)

RECORD_S = 0.005  # after a request's end, at the latest
TOGETHER = 32  # requests that are recorded in one go
NO_PRIORITY = Text(
    "priority: only a key with the scope admin may go in front of others (below 0); use 0 to 1000.",
    "priority: solo una clave con el alcance admin puede adelantarse a otras (por debajo de 0); use de 0 a 1000.",
)


Result = TypeVar("Result")


def _not_in_front() -> PermissionDenied:
    error = PermissionDenied(NO_PRIORITY)
    error.param = "priority"
    return error


class Gateway:
    """Every operation takes a Caller, passes `_enter` and `_leave` and leaves exactly one Record with each sink.

    `fingerprint` makes the keyed hash of a request's prompt, `trace` its place in the trace of a given traceparent.
    Each one is: admission -> sanitise -> fit -> limits and cache -> breaker -> Triton -> settle -> record.
    """

    def __init__(
        self, fleet: Fleet, admission: Admission, screen: Screen, tokens: Tokens, limiter: Limiter,
        flights: Flights | None, breakers: Breakers, upstream: Upstream, sinks: Sequence[Sink], answer_rules: str = "",
        fingerprint: Callable[[Any], str] = lambda request: "",
        trace: Callable[[str | None], Trace | None] = lambda traceparent: None,
    ) -> None:  # fmt: skip
        self.fleet, self._admission, self._screen, self._tokens = fleet, admission, screen, tokens
        self._limiter, self._flights, self._breakers, self._upstream = limiter, flights, breakers, upstream
        self._sinks, self._answer_rules = tuple(sinks), answer_rules
        self._fingerprint, self._trace = fingerprint, trace
        self._ended: list[Passage[Any]] = []  # and not yet recorded
        self._recording = False  # whether there is a timer for it

    def generate(self, caller: Caller, request: GenerateRequest, notes: Notes) -> Generation:
        """The answer's chunks; the last one has a finish reason. Close the iterator to cancel. Raises TruthGPTError.

        `notes` are complete when the first chunk comes, and on an error.
        """
        passage = Passage(caller, request, "generate", notes)

        async def prepare(prepared: Prepared[GenerateRequest]) -> None:
            model = await self.fleet.find(request.model)
            if not model.generates:
                raise mismatch(model, "generate", self.models)
            asked = request if request.task else changed(request, task=model.task)
            if request.priority < 0 and caller.scope != "admin":
                raise _not_in_front()
            prepared.request, notes.sanitized = await self._screen.generate(asked)
            if request.echo:
                notes.prompt = await self._screen.text(prepared.request)
            prepared.tokens = self._tokens.fit(model, prepared.request, caller.limits)
            if prepared.tokens:
                prepared.recount = partial(self._tokens.exact, model, prepared.request)
            if self._flights is not None:
                prepared.ticket = ticket(caller, model, prepared.request, self._answer_rules)

        return self._answer(passage, prepare, self._upstream.generate)

    async def encode(self, caller: Caller, request: EncodeRequest, notes: Notes) -> Encoded:
        """Embed or classify texts. Raises TruthGPTError."""
        passage = Passage(caller, request, request.operation, notes)
        model: Model | None = None

        async def prepare(prepared: Prepared[EncodeRequest]) -> None:
            nonlocal model
            model = await self.fleet.find(request.model)
            if model.operation != request.operation:
                raise mismatch(model, request.operation, self.models)
            fit(model, request)
            asked = request if request.task else changed(request, task=model.task)
            prepared.request, notes.sanitized = await self._screen.encode(asked)
            prepared.tokens = self._tokens.fit_texts(model, prepared.request, caller.limits)
            if self._flights is not None:
                prepared.ticket = encode_ticket(caller, model, prepared.request)

        async with aclosing(self._answer(passage, prepare, self._upstream.encode)) as chunks:
            async for chunk in chunks:
                if model is not None:
                    answer = await encoded(model, chunk)
                    fit(answer.model, request)  # of a version that was loaded meanwhile
                    return answer
        raise UpstreamError("the answer has no end")

    def _answer(
        self, passage: Passage[Prompt], prepare: Callable[[Prepared[Prompt]], Awaitable[None]],
        ask: Callable[[Prompt, Outcome, Put], Awaitable[None]],
    ) -> Generation:  # fmt: skip
        """What is shared and cached; `ask` asks Triton where nobody else has."""

        async def begin() -> tuple[Source, Callable[[], None] | None]:
            await self._enter(passage, prepare)
            return self._source(passage, ask)

        return Generation(passage, begin, partial(self._leave, passage))

    async def infer(self, caller: Caller, request: InferRequest, notes: Notes) -> InferResult:
        """Run a model that does not generate, once. Raises TruthGPTError."""

        async def prepare(prepared: Prepared[InferRequest]) -> None:
            await self.fleet.find(request.model)
            prepared.request, notes.sanitized = self._screen.infer(request)

        async def work(passage: Passage[InferRequest]) -> InferResult:
            notes.cache = "bypass"
            return await self._upstream.infer(passage.asks())

        return await self._run(Passage(caller, request, "infer", notes), prepare, work)

    async def _run(
        self, passage: Passage[Request], prepare: Callable[[Prepared[Request]], Awaitable[None]],
        work: Callable[[Passage[Request]], Awaitable[Result]],
    ) -> Result:  # fmt: skip
        """Let one request in, do its work, and settle and record it however it ends."""
        try:
            await self._enter(passage, prepare)
            result = await work(passage)
        except BaseException as error:
            self._leave(passage, error)
            raise
        self._leave(passage, None)
        return result

    async def _enter(
        self, passage: Passage[Request], prepare: Callable[[Prepared[Request]], Awaitable[None]]
    ) -> None:
        """Let one request in: afterwards it is counted, and its answer may come. `_leave` follows in any case."""
        tally, request, refusal = passage.tally, passage.request, None
        passage.trace, passage.input_hash = self._trace(request.traceparent), self._fingerprint(request)
        if passage.trace is not None:
            handling.set((request.id, passage.trace.own))
        passage.permit = self._admission.permit()
        prepared = Prepared(request)
        try:
            await prepare(prepared)
        except TruthGPTError as error:  # first it counts in the caller's limits, as every request does
            refusal, prepared.ticket = error.with_traceback(None), None
        tally.ended("prepare")
        passage.entry = await self._limiter.enter(
            passage.caller, passage.endpoint, prepared.tokens, passage.lease, prepared.ticket, passage.notes,
            prepared.recount,
        )  # fmt: skip
        passage.request, passage.ticket = prepared.request, prepared.ticket
        tally.ended("limits and cache")
        if refusal is not None:
            raise refusal.again()

    def _leave(self, passage: Passage[Any], error: BaseException | None) -> None:
        """Settle one request, which `error` has ended; its Record follows. Raises InternalError for a fault of ours."""
        tally = passage.tally
        if isinstance(error, TruthGPTError):
            tally.outcome, tally.error = "error", error.kind
        elif isinstance(error, Exception):
            tally.outcome, tally.error = "error", InternalError.kind
        elif error is not None:  # who leaves after the last chunk has it all
            tally.outcome = "ok" if tally.finish_reason else "cancelled"
        if passage.permit is not None:
            passage.permit.release()
        if tally.asked_s is not None:
            tally.ended("answer")
        if passage.entry is not None:
            self._limiter.leave(passage.entry, tally.charged)
        passage.end()
        self._ended.append(passage)
        if len(self._ended) >= TOGETHER:
            self.record()
        elif not self._recording:
            self._recording = True
            asyncio.get_running_loop().call_later(RECORD_S, self._record_late, context=Context())
        if isinstance(error, Exception) and not isinstance(error, TruthGPTError):
            raise InternalError(f"{type(error).__name__} on the request path") from error

    def _source(
        self, passage: Passage[Prompt], ask: Callable[[Prompt, Outcome, Put], Awaitable[None]]
    ) -> tuple[Source, Callable[[], None] | None]:
        """From where the answer comes: the cache, a flight that somebody else may have started, or Triton.

        And what is to be noted once its first chunk is there.
        """
        notes, tally, flights = passage.notes, passage.tally, self._flights
        lookup = passage.entry.lookup if passage.entry is not None else None
        if lookup is not None and lookup.answer is not None:
            notes.cache = "hit"
            return Ready(lookup.answer.chunk()), None
        request = passage.asks()
        if flights is None or passage.ticket is None or lookup is None or lookup.state == "bypass":
            notes.cache, tally.charge = "bypass", True
            flight = alone(partial(ask, request))

            def note_upstream() -> None:
                notes.fallback = flight.outcome.fallback

            return flight, note_upstream
        # Who shares an answer may have more time for it than the one who asked first.
        shared = request if request.timeout_s is None else changed(request, timeout_s=None)
        flight = flights.join(passage.ticket, lookup, partial(ask, shared))
        missed = notes.cache = "miss" if request.cache.lookup else "bypass"

        def note_flight() -> None:
            notes.cache, notes.fallback = "hit" if flight.shared else missed, flight.outcome.fallback
            tally.charge = not flight.shared

        deadline = passage.deadline
        return flight if deadline is None else within(flight, deadline), note_flight

    async def generate_all(
        self, caller: Caller, requests: Sequence[GenerateRequest], at_once: int, notes: Notes, each: Sequence[Notes]
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The answers to several requests, `at_once` of them at a time: a request's index and its chunk, as they come.

        Each request is one `generate()`. The first that fails ends the others and is raised; closing the iterator
        cancels them all. `notes` are those of all requests that have been heard of, the limits of the last one; `each`
        are the requests' own.
        """
        arrived: asyncio.Queue[tuple[int, Chunk] | asyncio.Task[None]] = asyncio.Queue()
        room = asyncio.Semaphore(at_once)  # chunks that may wait for the reader; a worker's end never has to wait
        rest = iter(enumerate(requests))

        async def work() -> None:
            for index, request in rest:  # shared: whoever is free takes the next one
                own, heard = each[index], False
                try:
                    async with aclosing(self.generate(caller, request, own)) as chunks:
                        async for chunk in chunks:
                            if not heard:
                                heard = True
                                notes.add(own)
                            await room.acquire()
                            arrived.put_nowait((index, chunk))
                except TruthGPTError:
                    notes.add(own)
                    raise

        workers = [asyncio.create_task(work()) for _ in range(min(at_once, len(requests)))]
        try:
            for worker in workers:
                worker.add_done_callback(arrived.put_nowait)
            running = len(workers)
            while running:
                item = await arrived.get()
                if isinstance(item, asyncio.Task):
                    item.result()  # raises what ended it
                    running -= 1
                else:
                    room.release()
                    yield item
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def find(self, name: str) -> Model:
        """A served model, ready or not. Raises ModelNotFound."""
        return await self.fleet.find(name)

    @property
    def models(self) -> list[Model]:
        """What is served, by name, ready or not."""
        return [served.model for served in self.fleet.served()]

    @property
    def served(self) -> list[Served]:
        """What is served with the state of each model, for people."""
        return self.fleet.served()

    @property
    def triton_up(self) -> bool:
        return self.fleet.triton_up

    @property
    def in_flight(self) -> int:
        return self._admission.in_flight

    @property
    def draining(self) -> bool:
        return self._admission.closed

    @property
    def breakers(self) -> dict[str, str]:
        """State of each model's breaker: closed, half_open or open."""
        return self._breakers.states()

    @property
    def limits_degraded(self) -> bool:
        """Whether limits are decided without Redis."""
        return self._limiter.degraded

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be taken and could be answered."""
        closed = all(self._breakers.state(served.model.name) != "open" for served in self.fleet.served())
        return self.fleet.ready and closed and not self._admission.closed and not self._admission.full

    async def drain(self, timeout_s: float) -> None:
        """Take nothing more, let what runs end for up to `timeout_s` seconds, then end it with Draining."""
        self._admission.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._admission.idle()
                if self._flights is not None:  # answers that only callers of other processes still read
                    await self._flights.idle()
        except TimeoutError:
            log.warning("%d requests of this worker did not end within %s s", self._admission.in_flight, timeout_s)
            self.fleet.fail_all(Draining())

    def record(self) -> None:
        """Record what has ended. Several in one go cost half as much: the processor has the code at hand."""
        ended, self._ended = self._ended, []
        for passage in ended:
            self._record(passage)

    def _record_late(self) -> None:
        self._recording = False
        self.record()

    def _record(self, passage: Passage[Any]) -> None:
        record = passage.record()
        for sink in self._sinks:
            try:
                sink(record)
            except Exception:  # a broken sink may not fail a request nor keep the record from the other sinks
                log.exception("a record could not be written")
