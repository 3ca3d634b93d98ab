"""Callers of the answer cache for tests: in this process, and in processes of their own that a test may kill."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cache import ENTER, Lookup, Ticket, lookup_of, ticket
from orchestrator.domain import CachePolicy, Caller, Chunk, GenerateRequest, Model
from orchestrator.errors import TruthGPTError
from orchestrator.flights import Flight, Flights, Outcome, Put, Times
from orchestrator.store import Store, StoreAway

from .conftest import until

QUICK = Times(renew_s=0.1, lock_s=1.5, beat_s=0.05, silence_s=1.2, coalesce_s=0.005, tick_s=0.02, patience_s=5.0)
MODEL = Model("demo", "1", 0, True, digest="d1")
WORDS = ("¡Hola, ", "mundo", "!")


def request(text: str = "hola", **changes: Any) -> GenerateRequest:
    return GenerateRequest(**{"id": "r", "model": "demo", "accepted_at": 0.0, "text": text, **changes})


@dataclass
class Upstream:
    """What a model would say: `words`, the first when `first` is set, the rest when `rest` is; then `error` if any.

    After the last chunk it lingers for `linger_s`, and it takes `closing_s` to close.
    """

    words: Sequence[str] = WORDS
    first: asyncio.Event = field(default_factory=asyncio.Event)
    rest: asyncio.Event = field(default_factory=asyncio.Event)
    pause_s: float = 0.0
    linger_s: float = 0.0
    closing_s: float = 0.0
    error: Exception | None = None
    fallback: str | None = None
    finish: str | None = "stop"
    version: str = "1"
    calls: int = 0
    closed: int = 0

    def go(self) -> Upstream:
        self.first.set()
        self.rest.set()
        return self

    async def stream(self, outcome: Outcome, put: Put) -> None:
        self.calls += 1
        try:
            await self.first.wait()
            outcome.fallback = self.fallback
            for index, word in enumerate(self.words):
                if index == 1:
                    await self.rest.wait()
                await asyncio.sleep(self.pause_s)
                put(Chunk(word, 1, 3, None, version=self.version))
            if self.error is not None:
                raise self.error
            put(Chunk("", 0, 3, self.finish))
            await asyncio.sleep(self.linger_s)
        finally:
            await asyncio.sleep(self.closing_s)
            self.closed += 1


@dataclass
class Replica:
    """One worker: asks as the gateway does."""

    store: Store
    flights: Flights
    upstream: Upstream

    async def enter(
        self, text: str = "hola", tenant: str = "t", policy: CachePolicy | None = None
    ) -> tuple[Ticket, Lookup]:
        """The look-up of a request."""
        wanted = ticket(Caller("c", tenant), MODEL, request(text, cache=policy or CachePolicy()))
        packed = wanted.args(self.store.worker, self.flights.lock_ms)
        try:
            return wanted, lookup_of(await self.store.run_script(ENTER, wanted.keys(), [packed]))
        except StoreAway:
            return wanted, Lookup.local()

    async def join(self, text: str = "hola", tenant: str = "t", policy: CachePolicy | None = None) -> Flight:
        wanted, lookup = await self.enter(text, tenant, policy)
        return self.flights.join(wanted, lookup, self.upstream.stream)

    async def ask(self, text: str = "hola", tenant: str = "t", policy: CachePolicy | None = None) -> str:
        """The whole answer. Raises what ended it."""
        return await read(await self.join(text, tenant, policy))


async def read(flight: Flight, pause_s: float = 0.0) -> str:
    """The rest of a flight's answer, left at its end; it must have ended properly."""
    chunks = []
    async with aclosing(flight):
        async for chunk in flight:
            chunks.append(chunk)
            await asyncio.sleep(pause_s)
    assert chunks and chunks[-1].finish_reason is not None
    return "".join(chunk.text for chunk in chunks)


@asynccontextmanager
async def replica(
    url: str, upstream: Upstream | None = None, times: Times = QUICK, ttl_s: int = 60, limit_bytes: int = 1 << 18,
    timeout_s: float = 0.2, wait: bool = True,
) -> AsyncIterator[Replica]:  # fmt: skip
    """A worker of this process, with a connection of its own."""
    store = Store(url, timeout_s)
    flights = Flights(store, lambda _: ttl_s, limit_bytes, times)
    tasks = [asyncio.create_task(store.run()), asyncio.create_task(flights.run())]
    try:
        if wait:
            await until(lambda: store.up)
        yield Replica(store, flights, upstream or Upstream())
    finally:
        for task in reversed(tasks):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Child:
    """A worker in a process of its own. `first_s` and `pause_s` are its upstream's, in seconds."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    @asynccontextmanager
    async def started(cls, url: str, first_s: float, pause_s: float = 0.0) -> AsyncIterator[Child]:
        arguments = [sys.executable, "-m", "tests.orchestrator.flying", url, str(first_s), str(pause_s)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*arguments, stdin=pipe, stdout=pipe)
        child = cls(process)
        try:
            await child.calls()  # ready
            yield child
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await child._reader

    async def calls(self) -> int:
        """How often its upstream was called."""
        return int((await self._say(do="calls"))["calls"])

    async def ask(self, text: str = "hola", tenant: str = "t") -> str:
        """The whole answer. Raises AssertionError with what ended it."""
        reply = await self._say(do="ask", text=text, tenant=tenant)
        assert "text" in reply, reply
        return str(reply["text"])

    async def _say(self, **command: Any) -> dict[str, Any]:
        number = len(self._waiting)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"number": number, **command}).encode() + b"\n")
        return await answer

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            reply = json.loads(line)
            self._waiting[reply["number"]].set_result(reply)


async def main(url: str, first_s: float, pause_s: float) -> None:
    """What a Child runs: a JSON line is a command, its answer is another."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    upstream = Upstream(pause_s=pause_s).go()

    async def stream(outcome: Outcome, put: Put) -> None:
        await asyncio.sleep(first_s)
        await upstream.stream(outcome, put)

    async with replica(url, times=Times()) as worker:
        tasks = set()

        async def ask(command: dict[str, Any]) -> None:
            wanted, lookup = await worker.enter(command["text"], command["tenant"])
            try:
                reply = {"text": await read(worker.flights.join(wanted, lookup, stream))}
            except TruthGPTError as error:
                reply = {"error": repr(error)}
            print(json.dumps({"number": command["number"], **reply}), flush=True)

        while line := await lines.readline():
            command = json.loads(line)
            if command["do"] == "calls":
                print(json.dumps({"number": command["number"], "calls": upstream.calls}), flush=True)
            else:
                task = asyncio.create_task(ask(command))
                tasks.add(task)
                task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
