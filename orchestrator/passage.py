"""One request's way along the path: what is known of it at each stage, what is counted, and the record at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from orchestrator.admission import Permit
from orchestrator.cache import Ticket
from orchestrator.domain import (
    TASKS,
    Caller,
    Chunk,
    EncodeRequest,
    GenerateRequest,
    InferRequest,
    Notes,
    Record,
    Trace,
    changed,
    made,
)
from orchestrator.errors import DeadlineExceeded
from orchestrator.flights import Flight
from orchestrator.ids import random_id
from orchestrator.limiter import Entry

MODEL_CHARS = 256  # of a model's name in a record: a client may name a model that is not served, at any length

Sink = Callable[[Record], None]
Request = TypeVar("Request", GenerateRequest, InferRequest, EncodeRequest)
Prompt = TypeVar("Prompt", GenerateRequest, EncodeRequest)  # whose answer may be shared and cached


@dataclass
class Prepared(Generic[Request]):
    """A request that may go on: sanitised, a bound on the tokens that it may use and how to know better, and its place
    in the cache.
    """

    request: Request
    tokens: int = 0
    recount: Callable[[], Awaitable[int]] | None = None
    ticket: Ticket | None = None


@dataclass
class Tally:
    """What is counted while a request runs."""

    accepted_at: float
    outcome: str = "ok"
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    ttft_s: float | None = None
    charge: bool = True
    output_chars: int = 0
    queue_s: float | None = None
    asked_s: float | None = None  # from acceptance until the answer was asked for elsewhere than in the cache
    stages: list[tuple[str, float]] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        if self.ttft_s is None:
            self.ttft_s = time.monotonic() - self.accepted_at
            self.queue_s = chunk.queue_s
        self.prompt_tokens = self.prompt_tokens or chunk.prompt_tokens
        self.completion_tokens += chunk.tokens
        self.output_chars += len(chunk.text)
        self.finish_reason = chunk.finish_reason

    def ended(self, stage: str) -> float:
        """Note the end of a stage: the seconds since acceptance."""
        at = time.monotonic() - self.accepted_at
        self.stages.append((stage, at))
        return at

    @property
    def charged(self) -> int:
        """Tokens that count in the caller's limits: an answer that others paid for costs none."""
        return self.prompt_tokens + self.completion_tokens if self.charge else 0


@dataclass
class Passage(Generic[Request]):
    """`entry` is None until the request has been counted; `request` becomes the sanitised one then."""

    caller: Caller
    request: Request
    endpoint: str
    notes: Notes
    permit: Permit | None = None
    entry: Entry | None = None
    ticket: Ticket | None = None
    input_hash: str = ""
    trace: Trace | None = None
    duration_s: float = 0.0
    accepted: float = 0.0  # Unix time
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = Tally(self.request.accepted_at, charge=False)
        self._lease = random_id(12) if self.caller.limits.concurrency else ""  # for nothing else

    @property
    def lease(self) -> str:
        """Unique to this request, whatever id its client gave it."""
        return self._lease

    @property
    def deadline(self) -> float | None:
        """Loop time at which the client's own patience ends."""
        request = self.request
        if request.timeout_s is None:
            return None
        return asyncio.get_running_loop().time() + request.timeout_s - (time.monotonic() - request.accepted_at)

    def asks(self) -> Request:
        """The request as Triton is to be sent it, from now on."""
        self.tally.asked_s = time.monotonic() - self.tally.accepted_at
        if self.trace is None:
            return self.request
        return changed(self.request, traceparent=self.trace.traceparent)

    def end(self) -> None:
        """Note that it has ended now; a Record will be made of it."""
        self.duration_s = time.monotonic() - self.request.accepted_at
        self.accepted = time.time() - self.duration_s
        self.notes.recorded = True

    def record(self) -> Record:
        """What happened, once it has ended."""
        request, notes, tally, duration_s = self.request, self.notes, self.tally, self.duration_s
        generates = isinstance(request, GenerateRequest)  # of another's answer there is no text, and no end but one
        return made(
            Record,
            id=request.id,
            caller=self.caller.id,
            tenant=self.caller.tenant,
            operation=self.endpoint,
            task=request.task or TASKS[0],
            model=request.model[:MODEL_CHARS],
            stream=isinstance(request, GenerateRequest) and request.stream,
            outcome=tally.outcome,
            error=tally.error,
            finish_reason=tally.finish_reason if generates else None,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            accepted=self.accepted,
            ttft_s=tally.ttft_s if generates else None,
            duration_s=duration_s,
            traceparent=request.traceparent,
            edge=notes.edge,
            route=notes.route,
            cache=notes.cache,
            fallback=notes.fallback,
            sanitized=notes.sanitized,
            refused=notes.refused,
            shadow=notes.shadow,
            limited=bool(notes.windows),
            degraded=self.entry is not None and self.entry.local,
            input_hash=self.input_hash,
            output_chars=tally.output_chars if generates else 0,
            upstream_s=None if tally.asked_s is None else duration_s - tally.asked_s,
            queue_s=tally.queue_s,
            stages=tuple(tally.stages),
            trace=self.trace,
        )


async def within(chunks: Flight, deadline: float) -> AsyncGenerator[Chunk, None]:
    """The same chunks, as long as each comes before a loop time. Raises DeadlineExceeded."""
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise DeadlineExceeded from error
            yield chunk
