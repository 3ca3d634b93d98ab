"""From a request to its model's answer: the breaker, retries before the first token, and the fallback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from orchestrator import encoding
from orchestrator.breaker import Breakers, Guard
from orchestrator.broadcast import Outcome, Put
from orchestrator.choices import Choice
from orchestrator.domain import Chunk, EncodeRequest, GenerateRequest, InferRequest, InferResult, changed
from orchestrator.errors import (
    DeadlineExceeded,
    Draining,
    EmptyAnswer,
    InvalidRequest,
    Overloaded,
    TruthGPTError,
    Unavailable,
    UpstreamError,
)
from orchestrator.errors import UpstreamUnavailable as Away
from orchestrator.fleet import Fleet, Member, Visit
from orchestrator.output import ChoicesGuard, OutputGuard
from orchestrator.retries import RetryBudget

log = logging.getLogger(__name__)

PARTS_AT_ONCE = 2  # of one request: while the model reads one, the next is there, and others come to their turn

_T = TypeVar("_T")


@dataclass(frozen=True)
class Fallback:
    """What answers in place of a model that cannot: another model first, then a fixed text. None: nothing does."""

    model: str | None = None
    text: str | None = None


class _Tap:
    """Through which the chunks of one answer go: they are checked, and the breaker hears of them."""

    def __init__(self, output: OutputGuard | ChoicesGuard, put: Put) -> None:
        self.output, self._put = output, put
        self.started = False
        self.guard: Guard

    def __call__(self, given: Chunk) -> bool:
        """Whether no more is wanted."""
        self.started = True
        chunk = self.output.feed(given)
        ended = self.output.ended
        self.guard.chunk(ended)
        if not (self.output.empty if ended else self.output.holds):
            self._put(chunk)
        return ended


class Upstream:
    """Asks Triton on behalf of the gateway. `observe(model, outcome)` is told how each attempt ended: ok, error or
    cancelled.
    """

    def __init__(
        self, fleet: Fleet, breakers: Breakers, retries: RetryBudget, fallback: Fallback,
        max_output_chars: int, observe: Callable[[str, str], None] = lambda model, outcome: None,
    ) -> None:  # fmt: skip
        self._fleet, self._breakers = fleet, breakers
        self._retries, self._fallback, self._max_output_chars = retries, fallback, max_output_chars
        self._observe = observe

    async def generate(self, request: GenerateRequest, outcome: Outcome, put: Put) -> None:
        """Hand the answer's chunks to `put`, checked and cut to the longest that is allowed; the last one has a finish
        reason.

        `outcome.fallback` is set before the first chunk where not the model itself answers. Raises TruthGPTError.
        """
        most = self._max_output_chars
        tap = _Tap(OutputGuard(most) if request.plain else ChoicesGuard(request, most), put)
        if self._fallback == Fallback():
            return await self._ask(request, tap)
        try:
            return await self._ask(request, tap)
        except (Unavailable, UpstreamError, DeadlineExceeded) as error:
            if tap.started or isinstance(error, (Overloaded, Draining, EmptyAnswer)):
                raise
            failure = error.with_traceback(None)
        other = self._fallback.model
        if other is not None and other != request.model:
            try:
                outcome.fallback = f"model={other}"
                return await self._ask(replace(request, model=other), tap)
            except TruthGPTError as error:
                if tap.started:
                    raise
                outcome.fallback = None
                log.warning("the fallback model %s cannot answer either: %s", other, error)
        if self._fallback.text is None:
            raise failure.again()
        outcome.fallback = "text"
        text = self._fallback.text
        choices = () if request.plain else tuple(Choice(at, text, finish_reason="stop") for at in range(request.n))
        put(Chunk(text, finish_reason="stop", choices=choices))

    async def _ask(self, request: GenerateRequest, tap: _Tap) -> None:
        """However often it is tried, a request is one success or one failure of its model's breaker."""
        self._fleet.require(request.model)  # a name that only its client knows gets no breaker
        self._retries.asked()
        with self._breakers.guard(request.model) as guard:
            tap.guard = guard
            await self._try(
                request, lambda visit: visit.triton.stream(request, visit.attendance, tap), guard, tap,
                key=self._fleet.key(request),
            )  # fmt: skip
        if tap.output.empty:  # no fault of a model that answers
            raise EmptyAnswer

    async def encode(self, request: EncodeRequest, outcome: Outcome, put: Put) -> None:
        """Hand the whole answer to `put`, one chunk (encoding.py). There is no fallback. Raises TruthGPTError.

        Texts that are more than the model takes at once are asked in parts, PARTS_AT_ONCE of them at the same time.
        """
        self._fleet.require(request.model)
        self._retries.asked()
        with self._breakers.guard(request.model) as guard:
            whole = await self._encode_whole(request, guard)
        put(whole)

    async def _encode_whole(self, request: EncodeRequest, guard: Guard) -> Chunk:
        """The answer, wholly of one version: where the model is reloaded under the request it is asked once more."""
        known = self._fleet.require(request.model)
        for last in (False, True):
            parts = encoding.parts(request, known.max_batch)
            ask = partial(self._encode, guard, known.version)
            results = await _in_turn(parts, known.max_batch, ask)
            versions = {result.version for result in results}
            if versions == {known.version}:
                return await encoding.together(request, known, results)
            known = await self._fleet.renew(known)
            if versions == {known.version} or (last and len(versions) == 1):  # or a heartbeat had no room to say so
                return await encoding.together(request, changed(known, version=results[0].version), results)
        raise Away(f"{request.model} was reloaded twice while it answered")

    async def _encode(self, guard: Guard, version: str, part: InferRequest, first: int) -> InferResult:
        """One part, whose first text is this one of the request, by a server that has this version if there is one."""
        try:
            result = await self._try(
                part, lambda visit: visit.triton.encode(part, visit.attendance), guard, version=version
            )
            await encoding.require_finite(result)
            return result
        except InvalidRequest as error:
            failure = encoding.placed(error.with_traceback(None), first)
        raise failure.again()

    async def _try(
        self, request: GenerateRequest | InferRequest, ask: Callable[[Visit], Awaitable[_T]], guard: Guard,
        tap: _Tap | None = None, version: str = "", key: bytes | None = None, again: bool = True,
    ) -> _T:  # fmt: skip
        """Ask until there is an answer, and no more once `tap` has had some of it or the retries are used up.

        Where another server can take over it does so at once. Unless `again`, no server is asked twice.
        """
        model, attempt, tried = request.model, 1, list[Member]()
        spilled = False
        while True:
            outcome = "cancelled"
            try:
                with self._fleet.attend(model, version, key, tried) as visit:
                    answer = await ask(visit)
                outcome = "ok"
                return answer
            except TruthGPTError as error:
                outcome = "error"
                another = isinstance(error, (Away, Overloaded)) and self._fleet.another(model, tried)
                guard.excused, started = another, tap is not None and tap.started
                if started or not isinstance(error, (Away, Overloaded)):
                    raise
                pause_s = 0.0
                if isinstance(error, Overloaded):
                    if spilled or not another:  # a queue that is full is no reason to ask everywhere
                        raise
                    spilled = True
                elif another and attempt <= self._retries.attempts:
                    attempt += 1
                elif again and self._retries.take(attempt):
                    pause_s = self._retries.pause_s(attempt)
                    attempt += 1
                else:
                    raise
                self._fleet.failovers += another
                log.info("request %s is tried again%s: %s", request.id, " elsewhere" if another else "", error)
            finally:
                # whoever has it all may leave before the end
                had_all = tap is not None and tap.output.ended
                self._observe(model, "ok" if outcome == "cancelled" and had_all else outcome)
            if pause_s:
                await asyncio.sleep(pause_s)

    async def infer(self, request: InferRequest) -> InferResult:
        """Run a model that does not generate, at most once at each server. Raises TruthGPTError."""
        known = self._fleet.require(request.model)
        with self._breakers.guard(request.model) as guard:
            try:
                return await self._try(
                    request, lambda visit: visit.triton.infer(request, visit.attendance), guard,
                    version=known.version, again=False,
                )  # fmt: skip
            except UpstreamError as error:  # an answer all the same: many backends say 500 to a wrong input
                failure = error.with_traceback(None)
        raise failure.again()


async def _in_turn(
    parts: list[InferRequest], size: int, ask: Callable[[InferRequest, int], Awaitable[InferResult]]
) -> list[InferResult]:
    """The parts' answers, PARTS_AT_ONCE of them asked at the same time. `size` is the number of texts in a part."""
    if len(parts) == 1:
        return [await ask(parts[0], 0)]
    results: dict[int, InferResult] = {}
    rest = iter(enumerate(parts))

    async def work() -> None:
        for index, part in rest:  # shared: whoever is free takes the next one
            results[index] = await ask(part, index * size)

    workers = [asyncio.create_task(work()) for _ in range(min(PARTS_AT_ONCE, len(parts)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [results[index] for index in range(len(parts))]
