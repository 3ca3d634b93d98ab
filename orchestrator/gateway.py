"""The request path. No wire formats here, and no Triton ones."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from orchestrator.admission import Admission
from orchestrator.domain import Caller, Chunk, GenerateRequest, Model, Record, Usage
from orchestrator.errors import Draining, InternalError, InvalidRequest, Text, TruthGPTError
from orchestrator.health import Health, Served
from orchestrator.triton import Triton

log = logging.getLogger(__name__)

Sink = Callable[[Record], None]
NO_TEMPLATE = Text(
    "messages: this model has no chat template; use /v1/completions, or export it with --chat-template FILE.",
    "messages: este modelo no tiene plantilla de chat; use /v1/completions o expórtelo con --chat-template FILE.",
)


class Gateway:
    """Every operation takes a Caller, passes admission and leaves exactly one Record with each sink."""

    def __init__(self, triton: Triton, health: Health, admission: Admission, sinks: Sequence[Sink]) -> None:
        self._triton, self._health, self._admission, self._sinks = triton, health, admission, tuple(sinks)

    async def generate(self, caller: Caller, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks; the last one has a finish reason. Close the iterator to cancel. Raises TruthGPTError."""
        tally = _Tally(caller, request)
        try:
            with self._admission.reserve():
                model = await self._health.model(request.model)
                if request.messages is not None and not model.chat:
                    raise InvalidRequest(NO_TEMPLATE, "messages")
                with self._health.attend(model.name) as attendance:
                    async with aclosing(self._triton.stream(request, attendance)) as chunks:
                        async for chunk in chunks:
                            tally.add(chunk)
                            yield chunk
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
            self._settle(tally.record())

    async def generate_all(
        self, caller: Caller, requests: Sequence[GenerateRequest], at_once: int
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The answers to several requests, `at_once` of them at a time: a request's index and its chunk, as they come.

        Each request is one `generate()`. The first that fails ends the others and is raised; closing the iterator
        cancels them all.
        """
        arrived: asyncio.Queue[tuple[int, Chunk] | asyncio.Task[None]] = asyncio.Queue()
        room = asyncio.Semaphore(at_once)  # chunks that may wait for the reader; a worker's end never has to wait
        rest = iter(enumerate(requests))

        async def work() -> None:
            for index, request in rest:  # shared: whoever is free takes the next one
                async with aclosing(self.generate(caller, request)) as chunks:
                    async for chunk in chunks:
                        await room.acquire()
                        arrived.put_nowait((index, chunk))

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
    def ready(self) -> bool:
        """Whether a request sent now would be taken and could be answered."""
        return self._health.ready and not self._admission.closed and not self._admission.full

    async def drain(self, timeout_s: float) -> None:
        """Take nothing more, let what runs end for up to `timeout_s` seconds, then end it with Draining."""
        self._admission.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._admission.idle()
        except TimeoutError:
            log.warning("%d requests did not end within %s s", self._admission.in_flight, timeout_s)
            self._health.fail_all(Draining())

    def _settle(self, record: Record) -> None:
        for sink in self._sinks:
            try:
                sink(record)
            except Exception:  # a broken sink may not fail a request nor keep the record from the other sinks
                log.exception("a record could not be written")


class _Tally:
    """What is counted while a request runs."""

    def __init__(self, caller: Caller, request: GenerateRequest) -> None:
        self.caller, self.request = caller, request
        self.outcome, self.error = "ok", None  # type: str, str | None
        self.usage, self.finish_reason, self.ttft_s = Usage(), None, None  # type: Usage, str | None, float | None

    def add(self, chunk: Chunk) -> None:
        if self.ttft_s is None:
            self.ttft_s = time.monotonic() - self.request.accepted_at
        self.usage = self.usage.plus(chunk)
        self.finish_reason = chunk.finish_reason

    def record(self) -> Record:
        duration_s = time.monotonic() - self.request.accepted_at
        return Record(
            id=self.request.id,
            caller=self.caller.id,
            tenant=self.caller.tenant,
            operation="generate",
            task=self.request.task,
            model=self.request.model,
            stream=self.request.stream,
            outcome=self.outcome,
            error=self.error,
            finish_reason=self.finish_reason,
            prompt_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens,
            accepted=time.time() - duration_s,
            ttft_s=self.ttft_s,
            duration_s=duration_s,
            traceparent=self.request.traceparent,
        )
