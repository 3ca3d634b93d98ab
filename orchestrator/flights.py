"""Single-flight: identical requests at the same time share one answer, in one process and over all that share a Redis.

A flight is a task of its own that belongs to none of its callers: each reads from the beginning at its own pace, any
may leave, and when the last one has left the upstream is closed. The flight leads (asks the upstream, under a lock in
Redis) or follows one in another process (relay.py). It can be joined until its answer is acknowledged as stored, so
that nobody slips between the end of a flight and the entry in the cache. Without Redis it is shared in its process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from orchestrator.broadcast import Broadcast, Outcome, Put
from orchestrator.cache import ENTER, LEAVE, RENEW, Lookup, Ticket, answer_of, encode, lookup_of
from orchestrator.domain import Chunk
from orchestrator.errors import Draining, InternalError, TruthGPTError
from orchestrator.relay import Followed, Relay, Times
from orchestrator.store import Argument, Script, Store, StoreAway, StoreError

__all__ = ["Flight", "Flights", "Outcome", "Put", "Start", "Times", "alone"]

log = logging.getLogger(__name__)

Start = Callable[[Outcome, Put], Awaitable[None]]  # makes the whole answer, chunk by chunk

_LOOKUPS = 6  # of a caller whose leader comes and goes, before it asks the upstream by itself
_STORING_S = 0.005
_DEFLATES = 16  # times smaller than they are log-probabilities never get, and a thousandth of a second each MB
_GONE_WAIT_S = 0.02  # doubled with each of them


class Flight:
    """One caller's part in a flight: its chunks from the beginning, whenever the caller joined. Close it to leave.

    Raises TruthGPTError: what ended the answer.
    """

    def __init__(self, run: _Run | _Alone, joined: bool) -> None:
        self._run, self._joined, self._at = run, joined, 0
        self._waiter: asyncio.Future[None] | None = None
        run.cast.join(self)

    @property
    def shared(self) -> bool:
        """Whether somebody else's answer is read. Settled when the first chunk is there."""
        return self._joined or not self._run.leads

    @property
    def outcome(self) -> Outcome:
        """Settled when the first chunk is there."""
        return self._run.cast.outcome

    def __aiter__(self) -> Flight:
        return self

    async def __anext__(self) -> Chunk:
        cast = self._run.cast
        while self._at == len(cast.chunks):
            if cast.error is not None:
                raise cast.error.again()
            if cast.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunk = cast.chunks[self._at]
        self._at += 1
        return chunk

    async def aclose(self) -> None:
        self._run.cast.leave(self)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Run:
    """A flight itself. `listed`: others may join it."""

    def __init__(self, ticket: Ticket, start: Start, listed: bool, on_empty: Callable[[_Run], None]) -> None:
        self.ticket, self.start, self.listed = ticket, start, listed
        self.cast = Broadcast(lambda: on_empty(self))
        self.leads = self.left = False
        self.renewed = time.monotonic()
        self.task: asyncio.Task[None] | None = None


class _Alone:
    """The making of an answer that nobody but its caller reads."""

    leads = True

    def __init__(self, start: Start) -> None:
        self.cast = Broadcast(self._empty)
        make = partial(start, self.cast.outcome, self.cast.add)
        self._task: asyncio.Task[bool] | None = asyncio.create_task(_made(self.cast, make))
        self._task.add_done_callback(self._done)

    def _empty(self) -> None:
        if self._task is not None and not self.cast.complete:
            self._task.cancel()

    def _done(self, task: asyncio.Task[bool]) -> None:
        self._task = None


def alone(start: Start) -> Flight:
    """A flight that nobody may join, for where nothing is cached."""
    return Flight(_Alone(start), joined=False)


async def _made(cast: Broadcast, make: Callable[[], Awaitable[None]]) -> bool:
    """Make an answer, and end it as its making ends; whether that ended well."""
    error: TruthGPTError | None = Draining()  # who still reads when this is cancelled
    try:
        await make()
        error = None
    except TruthGPTError as raised:
        error = raised.with_traceback(None)
    except Exception as raised:
        error = InternalError(f"{type(raised).__name__} in a flight")
        error.__cause__ = raised
    finally:
        cast.end(error)
    return error is None


class Flights:
    """All flights of this process. `ttl_of` tells the seconds that an answer of a task is kept."""

    def __init__(
        self, store: Store, ttl_of: Callable[[str], int], entry_limit_bytes: int, times: Times | None = None
    ) -> None:
        self._store, self._ttl_of, self._limit_bytes = store, ttl_of, entry_limit_bytes
        self._times = times or Times()
        self._relay = Relay(store, self._times, self._led)
        self._running: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def lock_ms(self) -> int:
        """Life of a flight's lock, for Ticket.args()."""
        return int(self._times.lock_s * 1000)

    def join(self, ticket: Ticket, lookup: Lookup, start: Start) -> Flight:
        """The flight that answers this request: one that runs, or a new one, which calls `start` if it has to lead.

        `start` must not depend on its caller (deadline, hang-up): others may read it. It runs in a task of its own,
        which closes it when nobody reads any more.
        """
        run = self._running.get(ticket.key)
        wanted = lookup.state != "bypass"  # the answer is: by others, by the cache
        if run is not None and wanted and ticket.policy.lookup:
            return Flight(run, joined=True)
        run = _Run(ticket, start, wanted and run is None, self._empty)
        if run.listed:
            self._running[ticket.key] = run
        run.leads = lookup.state not in ("hit", "follow")  # others may follow from now on
        flight = Flight(run, joined=False)
        run.task = self._spawn(self._fly(run, lookup))
        return flight

    async def run(self) -> None:
        """Hear the other processes, renew locks and beats until cancelled; then end every flight."""
        hush = self._relay.listen()
        try:
            while True:
                await asyncio.sleep(self._times.beat_s)
                self._relay.beat()
                now = time.monotonic()
                for run in self._running.values():
                    if run.leads and not run.left and now - run.renewed > self._times.renew_s - self._times.beat_s / 2:
                        run.renewed = now
                        self._spawn(self._renew(run.ticket))
        finally:
            self._relay.close()
            hush()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def idle(self) -> None:
        """Wait until no flight runs; some may have readers in other processes only."""
        while self._running:
            tasks = [run.task for run in self._running.values() if run.task is not None]
            if tasks:
                await asyncio.wait(tasks)
            else:  # their answers are being stored
                await asyncio.sleep(_STORING_S)

    async def _fly(self, run: _Run, lookup: Lookup) -> None:
        entry = None
        try:
            if await _made(run.cast, partial(self._make, run, lookup)) and run.leads:
                entry = self._entry(run)
        finally:
            self._leave(run, entry)  # also where it cannot be stored, or it would stay listed and its lock be renewed
            # The task keeps what cancelled it, that this frame, and this frame the run with all of its answer.
            run.task = None

    async def _make(self, run: _Run, lookup: Lookup) -> None:
        if lookup.state in ("hit", "follow") and await self._followed(run, lookup):
            return
        run.leads, cast = True, run.cast
        cast.outcome.fallback = None  # a leader that is gone may have spoken of one
        await run.start(cast.outcome, cast.add)

    async def _followed(self, run: _Run, lookup: Lookup) -> bool:
        """Whether the answer came from elsewhere: another process or the cache. If not, the flight has to lead."""
        wait_s = _GONE_WAIT_S
        for left in reversed(range(_LOOKUPS)):
            if lookup.answer is not None:
                self._unlist(run)  # who asks for a younger answer looks for himself
                run.cast.add(lookup.answer.chunk())
                return True
            if lookup.state != "follow":
                return False
            dead = ""
            if lookup.leader == self._store.worker:
                dead = lookup.leader  # it was a flight of ours that has ended since
            else:
                how = await self._relay.follow(run.cast, run.ticket.key, lookup.leader)
                if how is Followed.ENDED:
                    return True
                if how is Followed.AWAY:
                    return False
                if how is Followed.SILENT or left <= 1:
                    dead = lookup.leader
                else:  # it ended, or has not begun: its process is between the look-up and the start
                    await asyncio.sleep(wait_s)
                    wait_s *= 2
            lookup = await self._look_again(run.ticket, dead)
        return False

    async def _look_again(self, ticket: Ticket, dead: str) -> Lookup:
        packed = ticket.args(self._store.worker, self.lock_ms, again=True, dead=dead)
        reply = await self._try(ENTER, ticket.keys(), [packed])
        return Lookup.local() if reply is None else lookup_of(reply)

    def _led(self, key: str) -> Broadcast | None:
        """The answer that this process makes under a key, for those who follow it."""
        run = self._running.get(key)
        return run.cast if run is not None and run.leads else None

    def _entry(self, run: _Run) -> bytes | None:
        """The finished answer as it is stored; None if it is not one to be stored, empty if it is too large."""
        cast, ticket = run.cast, run.ticket
        if not cast.complete or cast.outcome.fallback is not None or not ticket.policy.store:
            return None
        if any(chunk.version not in ("", ticket.version) for chunk in cast.chunks):
            return None  # the model was reloaded after the request had been looked up
        answer = answer_of(cast.chunks)
        if ticket.task == "embeddings" and len(answer.text) > self._limit_bytes:
            return b""  # vectors are stored as they are: it need not be written out to be found too large
        if sum(len(choice.logprobs) for choice in answer.choices) > _DEFLATES * self._limit_bytes:
            return b""
        entry = encode(answer, ticket.model, ticket.task)
        return entry if len(entry) <= self._limit_bytes else b""

    def _leave(self, run: _Run, entry: bytes | None) -> None:
        """Store the answer and give the lock back, in one step; once for each flight. Nobody joins it afterwards."""
        if entry is None:
            self._unlist(run)
        if run.left or not run.leads or (entry is None and not run.listed):
            self._unlist(run)
            return
        run.left, ticket = True, run.ticket
        holder = self._store.worker if run.listed else ""  # an unlisted flight may not give back a listed one's lock
        too_large = ticket.task if entry == b"" else ""
        ttl_ms = max(1, self._ttl_of(ticket.task) * 1000)
        try:
            args: list[Argument] = [holder, entry or b"", ttl_ms, too_large]
            # lazy: others are answered by this process until it is stored
            reply = self._store.script(LEAVE, ticket.keys(), args, lazy=bool(entry))
        except StoreAway as error:
            log.debug("the cache goes without Redis: %s", error)
            self._unlist(run)
        else:
            reply.add_done_callback(partial(self._left, run))

    def _left(self, run: _Run, reply: asyncio.Future[Any]) -> None:
        self._unlist(run)
        if not reply.cancelled() and (error := reply.exception()) is not None:
            log.debug("the cache goes without Redis: %s", error)

    async def _renew(self, ticket: Ticket) -> None:
        await self._try(RENEW, ticket.keys()[1:2], [self._store.worker, self.lock_ms])

    async def _try(self, script: Script, keys: list[str], args: list[str | bytes | int]) -> Any:
        """What the script replied, None without Redis: the cache is a help and never a reason to fail."""
        try:
            return await self._store.run_script(script, keys, args)
        except (StoreAway, StoreError) as error:
            log.debug("the cache goes without Redis: %s", error)
            return None

    def _empty(self, run: _Run) -> None:
        """The last caller has left. A complete answer is stored all the same."""
        if not run.cast.complete and run.task is not None:
            # At once, not when the upstream is closed: by then the lock may be that of the next flight.
            self._leave(run, None)
            run.task.cancel()

    def _unlist(self, run: _Run) -> None:
        if self._running.get(run.ticket.key) is run:
            del self._running[run.ticket.key]

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
