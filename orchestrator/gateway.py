"""The request path. No wire formats here, no Triton ones and no Redis commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from orchestrator.admission import Admission
from orchestrator.breaker import Breakers
from orchestrator.broadcast import Outcome
from orchestrator.cache import ticket
from orchestrator.context import handling
from orchestrator.domain import (
    Caller,
    Chunk,
    EmbedRequest,
    GenerateRequest,
    InferRequest,
    InferResult,
    Model,
    Notes,
    Trace,
    changed,
)
from orchestrator.errors import Draining, InternalError, InvalidRequest, Text, TruthGPTError
from orchestrator.flights import Flight, Flights
from orchestrator.health import Health, Served
from orchestrator.limiter import Limiter
from orchestrator.passage import Passage, Prepared, Sink, within
from orchestrator.screening import Screen
from orchestrator.tokens import Tokens
from orchestrator.upstream import Upstream

log = logging.getLogger(__name__)

NO_EMBEDDINGS = Text("There is no embedding model here.", "Aquí no hay ningún modelo de embeddings.")
NOT_GENERATING = Text("This model does not generate text; use infer.", "Este modelo no genera texto; use infer.")


Chunks = AsyncGenerator[Chunk, None] | Flight


async def _single(chunk: Chunk) -> AsyncGenerator[Chunk, None]:
    yield chunk


class Gateway:
    """Every operation takes a Caller, passes `_pass` and leaves exactly one Record with each sink.

    `fingerprint` makes the keyed hash of a request's prompt, `trace` its place in the trace of a given traceparent.
    Each one is: admission -> sanitise -> fit -> limits and cache -> breaker -> Triton -> settle -> record.
    """

    def __init__(
        self, health: Health, admission: Admission, screen: Screen, tokens: Tokens, limiter: Limiter,
        flights: Flights | None, breakers: Breakers, upstream: Upstream, sinks: Sequence[Sink], answer_rules: str = "",
        fingerprint: Callable[[Any], str] = lambda request: "",
        trace: Callable[[str | None], Trace | None] = lambda traceparent: None,
    ) -> None:  # fmt: skip
        self._health, self._admission, self._screen, self._tokens = health, admission, screen, tokens
        self._limiter, self._flights, self._breakers, self._upstream = limiter, flights, breakers, upstream
        self._sinks, self._answer_rules = tuple(sinks), answer_rules
        self._fingerprint, self._trace = fingerprint, trace

    async def generate(self, caller: Caller, request: GenerateRequest, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks; the last one has a finish reason. Close the iterator to cancel. Raises TruthGPTError.

        `notes` are complete when the first chunk comes, and on an error.
        """

        async def prepare(prepared: Prepared[GenerateRequest]) -> None:
            model = await self._health.find(request.model)
            if not model.generates:
                raise InvalidRequest(NOT_GENERATING, "model")
            asked = request if request.task else changed(request, task=model.task)
            prepared.request, notes.sanitized = await self._screen.generate(asked)
            prepared.tokens = self._tokens.fit(model, prepared.request, caller.limits)
            if prepared.tokens:
                prepared.recount = partial(self._tokens.exact, model, prepared.request)
            if self._flights is not None:
                prepared.ticket = ticket(caller, model, prepared.request, self._answer_rules)

        async with self._pass(caller, request, "generate", notes, prepare) as passage:
            source, note = self._source(passage)
            async with aclosing(source) as chunks:
                async for chunk in chunks:
                    if note is not None:
                        note()
                        note = None
                    passage.tally.add(chunk)
                    yield chunk
                    if chunk.finish_reason is not None:
                        return  # the answer's end is not waited for, only its last chunk

    async def infer(self, caller: Caller, request: InferRequest, notes: Notes) -> InferResult:
        """Run a model that does not generate, once. Raises TruthGPTError."""

        async def prepare(prepared: Prepared[InferRequest]) -> None:
            await self._health.find(request.model)
            prepared.request, notes.sanitized = self._screen.infer(request)

        async with self._pass(caller, request, "infer", notes, prepare) as passage:
            notes.cache = "bypass"
            return await self._upstream.infer(passage.asks())

    async def embed(self, caller: Caller, request: EmbedRequest, notes: Notes) -> None:
        """Turn texts into vectors: nothing that is served can, so far. Raises TruthGPTError."""

        async def prepare(prepared: Prepared[EmbedRequest]) -> None:
            prepared.request, notes.sanitized = self._screen.embed(request)
            raise InvalidRequest(NO_EMBEDDINGS, "model")

        async with self._pass(caller, request, "embed", notes, prepare):
            raise InternalError("no model embeds, and no request for it may come this far")

    @asynccontextmanager
    async def _pass(
        self, caller: Caller, request: Any, endpoint: str, notes: Notes,
        prepare: Callable[[Prepared[Any]], Awaitable[None]],
    ) -> AsyncIterator[Passage[Any]]:  # fmt: skip
        """Let one request in, and settle and record it however it ends."""
        passage: Passage[Any] = Passage(caller, request, endpoint, notes)
        tally, refusal = passage.tally, None
        try:
            passage.trace, passage.input_hash = self._trace(request.traceparent), self._fingerprint(request)
            if passage.trace is not None:
                handling.set((request.id, passage.trace.own))
            with self._admission.permit():
                prepared: Prepared[Any] = Prepared(request)
                try:
                    await prepare(prepared)
                except TruthGPTError as error:  # first it counts in the caller's limits, as every request does
                    refusal, prepared.ticket = error.with_traceback(None), None
                tally.ended("prepare")
                entry = await self._limiter.enter(
                    caller, endpoint, prepared.tokens, passage.lease, prepared.ticket, notes, prepared.recount
                )
                passage.entry, passage.request, passage.ticket = entry, prepared.request, prepared.ticket
                tally.ended("limits and cache")
                if refusal is not None:
                    raise refusal.again()
                yield passage
        except (asyncio.CancelledError, GeneratorExit):
            tally.outcome = "ok" if tally.finish_reason else "cancelled"  # who leaves after the last chunk has it all
            raise
        except TruthGPTError as error:
            tally.outcome, tally.error = "error", error.kind
            raise
        except Exception as error:
            tally.outcome, tally.error = "error", InternalError.kind
            raise InternalError(f"{type(error).__name__} on the request path") from error
        finally:
            if tally.asked_s is not None:
                tally.ended("answer")
            if passage.entry is not None:
                self._limiter.leave(passage.entry, tally.charged)
            self._record(passage)

    def _source(self, passage: Passage[GenerateRequest]) -> tuple[Chunks, Callable[[], None] | None]:
        """From where the answer comes: the cache, a flight that somebody else may have started, or Triton.

        And what is to be noted once its first chunk is there.
        """
        notes, tally, flights = passage.notes, passage.tally, self._flights
        lookup = passage.entry.lookup if passage.entry is not None else None
        if lookup is not None and lookup.answer is not None:
            notes.cache = "hit"
            return _single(lookup.answer.chunk()), None
        request = passage.asks()
        if flights is None or passage.ticket is None or lookup is None or lookup.state == "bypass":
            notes.cache, tally.charge = "bypass", True
            outcome = Outcome()

            def note_upstream() -> None:
                notes.fallback = outcome.fallback

            return self._upstream.generate(request, outcome), note_upstream
        # Who shares an answer may have more time for it than the one who asked first.
        shared = request if request.timeout_s is None else changed(request, timeout_s=None)
        flight = flights.join(passage.ticket, lookup, lambda out: self._upstream.generate(shared, out))
        missed = notes.cache = "miss" if request.cache.lookup else "bypass"

        def note_flight() -> None:
            notes.cache, notes.fallback = "hit" if flight.shared else missed, flight.outcome.fallback
            tally.charge = not flight.shared

        deadline = passage.deadline
        return flight.chunks() if deadline is None else within(flight.chunks(), deadline), note_flight

    async def generate_all(
        self, caller: Caller, requests: Sequence[GenerateRequest], at_once: int, notes: Notes
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The answers to several requests, `at_once` of them at a time: a request's index and its chunk, as they come.

        Each request is one `generate()`. The first that fails ends the others and is raised; closing the iterator
        cancels them all. `notes` are those of all requests that have been heard of, the limits of the last one.
        """
        arrived: asyncio.Queue[tuple[int, Chunk] | asyncio.Task[None]] = asyncio.Queue()
        room = asyncio.Semaphore(at_once)  # chunks that may wait for the reader; a worker's end never has to wait
        rest = iter(enumerate(requests))

        async def work() -> None:
            for index, request in rest:  # shared: whoever is free takes the next one
                own, heard = Notes(edge=notes.edge, route=notes.route), False
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
        return await self._health.find(name)

    @property
    def models(self) -> list[Model]:
        """What is served, by name, ready or not."""
        return [served.model for served in self._health.served()]

    @property
    def served(self) -> list[Served]:
        """What is served with the state of each model, for people."""
        return self._health.served()

    @property
    def triton_up(self) -> bool:
        return self._health.triton_up

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
        closed = all(self._breakers.state(served.model.name) != "open" for served in self._health.served())
        return self._health.ready and closed and not self._admission.closed and not self._admission.full

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
            self._health.fail_all(Draining())

    def _record(self, passage: Passage[Any]) -> None:
        record, passage.notes.recorded = passage.record(), True
        for sink in self._sinks:
            try:
                sink(record)
            except Exception:  # a broken sink may not fail a request nor keep the record from the other sinks
                log.exception("a record could not be written")
