"""One measurement from its first question to its figures."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, Protocol

from orchestrator.bench.answers import Answer, BenchError, Fault
from orchestrator.bench.figures import Run
from orchestrator.bench.plan import Load, PlanError, Progress, Prompt, Target
from orchestrator.bench.prompts import Given, Prompts, Sizing, size

__all__ = ["BenchError", "measure"]

GIVE_UP = 20  # failures in a row, of each client: the server is gone
TICK_S = 0.0015  # what a sleep of the loop may be late
AFTER_ERROR_S = 0.05  # a client whose request failed waits so long: a server that refuses at once is not stormed
SIZING_TOKENS = 4  # of the answers to the first questions
END_S = 2.0  # for what was cancelled to have ended


class Wire(Protocol):
    """How an endpoint is asked: HttpWire or GrpcWire."""

    async def ask(self, prompt: Prompt, tokens: int, answer: Answer) -> None: ...
    async def close(self) -> None: ...


class _Stopped(Exception):
    """Who looks on wants no more."""


async def measure(
    target: Target, load: Load, progress: Progress | None = None, *, stop: asyncio.Event | None = None,
    sizing: Sizing | None = None,
) -> Run:  # fmt: skip
    """Put the load on the target and tell what came of it.

    First a few requests are made that are not counted: they show that the endpoint answers, and how long a prompt has
    to be; a `Run` knows what they found, and its `sizing` spares the next one the questions. When `stop` is set, what
    is under way is cancelled and the figures so far are returned, `interrupted`. Failed requests are counted in
    `Run.errors`; raises BenchError when already the first question is not answered well, and PlanError when load and
    target do not go together.
    """
    progress, stop = progress or Progress(), stop or asyncio.Event()
    if not target.converses and any(prompt.turns for prompt in load.prompts):
        raise PlanError("prompts: this endpoint takes no messages", "give texts, or ask the chat endpoint")
    wire = _wire(target, load)
    run = Run(load, sizing)
    try:
        measurement = _Measurement(target, load, wire, progress, run)
        await _unless(stop, measurement.whole())
    except _Stopped:
        run.interrupted = True
    finally:
        await wire.close()
    return run


class _Measurement:
    def __init__(self, target: Target, load: Load, wire: Wire, progress: Progress, run: Run) -> None:
        self._target, self._load, self._wire, self._progress, self._run = target, load, wire, progress, run
        self._asked = 0 if target.task == "encode" else load.output_tokens
        self._in_a_row = 0  # failures
        self._prompts: Prompts | Given

    async def whole(self) -> None:
        load, run = self._load, self._run
        if load.prompts:
            self._prompts = Given(load.prompts)
            if run.sizing is None:
                await self._first(load.prompts[0], min(SIZING_TOKENS, load.output_tokens))
                run.sizing = Sizing(0, None)
        else:
            if run.sizing is None:
                run.sizing = await self._size()
            # each run of a sweep has others: a server that keeps prefixes finds none of them
            self._prompts = Prompts(f"{load.seed} {load.concurrency} {load.rate}", run.sizing.words)
        if load.warmup:
            self._begin("warming up", load.warmup)
            await self._closed(load.concurrency or min(load.warmup, load.max_in_flight), load.warmup, None, None)
        self._begin("measuring", load.requests)
        gc.collect()
        gc.freeze()  # what is here already is not looked at again while times are taken
        began, cpu = time.perf_counter(), time.process_time()
        try:
            until = None if load.duration_s is None else began + load.duration_s
            if load.concurrency is not None:
                await self._closed(load.concurrency, load.requests, until, run)
            else:
                await self._open(load.rate or 0.0, load.requests, until, run)
        finally:
            run.seconds, run.cpu_s = time.perf_counter() - began, time.process_time() - cpu
            gc.unfreeze()

    def _begin(self, stage: str, total: int | None) -> None:
        progress = self._progress
        progress.stage, progress.done, progress.errors, progress.total = stage, 0, 0, total
        progress.began = asyncio.get_running_loop().time()
        progress.until_s = self._load.duration_s if stage == "measuring" else None

    async def _size(self) -> Sizing:
        """How many words a prompt of the wanted length has."""
        wanted = self._load.prompt_tokens or 1
        # numbers that no run of this seed has: a cache must not know them
        asking = random.Random(f"{self._load.seed} sizing").randrange(1 << 30)  # noqa: S311  no secret

        async def ask(words: int) -> int | None:
            nonlocal asking
            asking += 1
            tokens = min(SIZING_TOKENS, self._load.output_tokens)
            return (await self._first(Prompts(str(asking), words).take(), tokens)).prompt_tokens

        return await size(wanted, ask)

    async def _first(self, prompt: Prompt, tokens: int) -> Answer:
        """A question that is not counted, whose failure ends all. Raises BenchError."""
        answer = Answer(tokens if self._asked else 0)
        fault = await self._ask(prompt, tokens, answer)
        if fault is not None and fault.kind != "no_tokens":  # a model may end at once
            raise BenchError(f"{self._target.url} does not answer well ({fault.kind}): {fault}", _hint(fault.kind))
        return answer

    async def _ask(self, prompt: Prompt, tokens: int, answer: Answer) -> Fault | None:
        limit_s = self._load.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._wire.ask(prompt, tokens, answer)
        except TimeoutError:
            what = "no end" if answer.first else "no token"
            return Fault("timeout", f"{what} within {limit_s:g} s")
        except Fault as fault:
            return fault.without(self._target.secrets)
        return None

    async def _request(self, due: float, run: Run | None) -> bool:
        """One request, counted in `run` if there is one; whether it was answered well."""
        answer = Answer(self._asked)
        fault = await self._ask(self._prompts.take(), self._load.output_tokens, answer)
        self._progress.done += 1
        self._in_a_row = 0 if fault is None else self._in_a_row + 1
        if fault is not None:
            self._progress.errors += 1
            if run is not None:
                run.failed(fault)
        elif run is not None:
            run.took(answer, due)
        return fault is None

    async def _closed(self, concurrency: int, requests: int | None, until: float | None, run: Run | None) -> None:
        """So many clients, each of which asks again when it has its answer."""
        begun = 0

        async def client() -> None:
            nonlocal begun
            while (requests is None or begun < requests) and (until is None or time.perf_counter() < until):
                begun += 1
                if not await self._request(time.perf_counter(), run):
                    if self._in_a_row >= GIVE_UP * concurrency:
                        self._run.gave_up = True
                        return
                    await asyncio.sleep(AFTER_ERROR_S)

        await _all([client() for _ in range(min(concurrency, requests or concurrency))])

    async def _open(self, rate: float, requests: int | None, until: float | None, run: Run) -> None:
        """Requests that come at random whether or not those before them have been answered.

        Each counts from when it was due: one that had to wait for a place in here is the later for it.
        """
        places = asyncio.Semaphore(self._load.max_in_flight)
        rng = random.Random(f"{self._load.seed} arrivals")  # noqa: S311  no secret
        under_way: set[asyncio.Task[None]] = set()
        due, begun = time.perf_counter(), 0

        async def one(at: float) -> None:
            try:
                await self._request(at, run)
            finally:
                places.release()

        try:
            while requests is None or begun < requests:
                if self._in_a_row >= GIVE_UP:
                    run.gave_up = True
                    break
                due += rng.expovariate(rate)
                if until is not None and due >= until:
                    break
                await asyncio.sleep(max(0.0, due - time.perf_counter() - TICK_S))
                while time.perf_counter() < due:  # noqa: ASYNC110 (the loop's own clock is too coarse)
                    await asyncio.sleep(0)
                full = places.locked()
                await places.acquire()
                if full and until is not None and time.perf_counter() >= until:
                    run.failed(Fault("unsent", self._unsent(1 + (until - due) * rate)))
                    break
                begun += 1
                task = asyncio.create_task(one(due))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.gather(*under_way)
        finally:
            await _end(under_way)

    def _unsent(self, about: float) -> str:
        places = f"{self._load.max_in_flight} requests were under way"
        return f"about {about:.0f} requests were due and could not be sent: {places}"


async def _all(clients: list[Coroutine[Any, Any, None]]) -> None:
    """Run them at once; a fault of ours in one ends the others."""
    tasks = {asyncio.create_task(client) for client in clients}
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=END_S)


async def _unless(stop: asyncio.Event, work: Awaitable[None]) -> None:
    """Await some work. Raises _Stopped when `stop` is set before its end."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait((working,), timeout=2 * END_S)
            raise _Stopped
        working.result()
    finally:
        for one in (working, stopping):
            one.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def _wire(target: Target, load: Load) -> Wire:
    if target.protocol == "kserve-grpc":
        from orchestrator.bench.grpcwire import GrpcWire

        return GrpcWire(target, load)
    from orchestrator.bench.httpwire import HttpWire

    return HttpWire(target, load)


_HINTS: dict[str, str] = {
    "connect": "check the URL, and that the server runs: for a stack of this machine `truthgpt status` says so",
    "tls": "check the URL's scheme, or give the certificates to trust with --ca-file",
    "timeout": "wait until it is ready, or raise --timeout",
    "content_type": "check --protocol and --url: this looks like another kind of server",
    "nonsense": "check --protocol and --url: this looks like another kind of server",
    "http_401": "give a key in TRUTHGPT_API_KEY, or in a file with --api-key-file",
    "http_403": "give a key that may ask this in TRUTHGPT_API_KEY, or in a file with --api-key-file",
    "http_404": "check --model, --protocol and --url",
    "http_429": "the server's rate limits are too low for a measurement: give a key with higher ones",
    "grpc_unauthenticated": "give a key in TRUTHGPT_API_KEY, or in a file with --api-key-file",
    "grpc_unavailable": "check the URL, which is HOST:PORT of the gRPC port, and that the server runs",
    "grpc_not_found": "check --model",
}


def _hint(kind: str) -> str:
    return _HINTS.get(kind, "mend what it says, and measure then")
