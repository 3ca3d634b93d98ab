"""The request path: one record whatever happens, and nothing left running."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from orchestrator.domain import Caller, Chunk, GenerateRequest, Message, Notes, Record
from orchestrator.errors import Draining, GatewayFull, InternalError, InvalidRequest, ModelNotFound, UpstreamUnavailable

from .conftest import Stack, serving, until
from .fake_triton import FakeTriton, event

CALLER = Caller("tester")


def request(**changes: Any) -> GenerateRequest:
    return GenerateRequest(**{"id": "r1", "model": "m", "accepted_at": time.monotonic(), "text": "Hola", **changes})


async def consume(stack: Stack, **changes: Any) -> str:
    async with aclosing(stack.gateway.generate(CALLER, request(**changes), Notes())) as chunks:
        return "".join([chunk.text async for chunk in chunks])


async def test_an_answer_leaves_one_record(stack: Stack) -> None:
    """A complete answer is recorded as ok with its tokens and times."""
    assert await consume(stack, stream=True) == "Hola, ¿qué tal?"
    (record,) = stack.records
    assert (record.outcome, record.error, record.finish_reason) == ("ok", None, "stop")
    assert (record.prompt_tokens, record.completion_tokens) == (3, 3)
    assert record.ttft_s is not None
    assert 0 < record.ttft_s <= record.duration_s < 2
    assert (record.caller, record.model, record.operation, record.stream) == ("tester", "m", "generate", True)


@pytest.mark.parametrize(
    ("changes", "error", "kind"),
    [
        ({"model": "ghost"}, ModelNotFound, "not_found"),
        ({"text": None, "messages": (Message("user", "x"),)}, InvalidRequest, "invalid_argument"),
        ({}, UpstreamUnavailable, "unavailable"),
    ],
)
async def test_failures_are_recorded_by_kind(
    fake: FakeTriton, changes: dict[str, Any], error: type[Exception], kind: str
) -> None:
    """Whatever ends a request, its record says error and the kind, and its place is free again."""
    fake.parameters["chat"] = "false"
    fake.script = [event("a"), "close"]
    async with serving(fake) as stack:
        with pytest.raises(error):
            await consume(stack, **changes)
        (record,) = stack.records
        assert (record.outcome, record.error) == ("error", kind)
        assert stack.gateway.in_flight == 0


async def test_a_bug_is_an_internal_error_with_its_cause(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody foresaw is recorded and raised as InternalError from it."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("orchestrator.triton.client.payload", broken)
    with pytest.raises(InternalError) as caught:
        await consume(stack)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert stack.records[0].error == "internal"


async def test_closing_early_cancels_upstream_and_says_so(stack: Stack) -> None:
    """A caller who leaves mid-answer frees the slot and is recorded as cancelled, neither ok nor error."""
    stack.fake.script = [event("a"), math.inf]
    chunks = stack.gateway.generate(CALLER, request(), Notes())
    await anext(chunks)
    await chunks.aclose()
    await until(lambda: stack.fake.hang_ups == 1)
    assert (stack.records[0].outcome, stack.records[0].error) == ("cancelled", None)
    assert stack.gateway.in_flight == 0


async def test_concurrency_is_bounded(fake: FakeTriton) -> None:
    """The request over the bound is refused at once, fails readiness meanwhile, and never reaches Triton."""
    fake.script = [event("a"), 0.3, event("b", "stop"), "end"]
    async with serving(fake, max_concurrency=2) as stack:
        running = [asyncio.create_task(consume(stack)) for _ in range(2)]
        await until(lambda: fake.running == 2)
        assert not stack.gateway.ready
        with pytest.raises(GatewayFull):
            await consume(stack)
        assert await asyncio.gather(*running) == ["ab", "ab"]
        assert len(fake.requests) == 2
        assert stack.gateway.ready


async def test_several_requests_wait_for_a_reader_that_is_slow(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nobody reading, no more chunks are taken than have room; closing then cancels every request."""
    stack.fake.script = [event("a")] * 200 + [event("b", "stop"), "end"]
    taken = 0
    generate = stack.gateway.generate

    async def counted(caller: Caller, asked: GenerateRequest, notes: Notes) -> AsyncGenerator[Chunk, None]:
        nonlocal taken
        async with aclosing(generate(caller, asked, notes)) as chunks:
            async for chunk in chunks:
                taken += 1
                yield chunk

    monkeypatch.setattr(stack.gateway, "generate", counted)
    requests = [request(id=f"r-{index}") for index in range(3)]
    pieces = stack.gateway.generate_all(CALLER, requests, 2, Notes(), [Notes() for _ in requests])
    await anext(pieces)
    await until(lambda: stack.fake.running == 0)  # both upstream streams lie ready in the sockets
    assert taken <= 1 + 2 + 2, "read, waiting in the queue, and held by each of the two workers"
    await pieces.aclose()
    assert [record.outcome for record in stack.records] == ["cancelled", "cancelled"]
    assert (stack.gateway.in_flight, len(stack.fake.requests)) == (0, 2)


async def test_draining_lets_requests_end_then_ends_them(fake: FakeTriton) -> None:
    """drain() refuses newcomers, waits for the short request and fails the endless one with Draining."""
    fake.scripts = [[event("a"), 0.2, event("b", "stop"), "end"], [event("a"), math.inf]]
    async with serving(fake, stall_s=5.0) as stack:
        short = asyncio.create_task(consume(stack))
        await until(lambda: fake.running == 1)
        endless = asyncio.create_task(consume(stack))
        await until(lambda: fake.running == 2)
        drain = asyncio.create_task(stack.gateway.drain(2.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await consume(stack)
        assert await short == "ab"
        with pytest.raises(Draining):
            await endless
        await drain


async def test_a_record_holds_a_bounded_name(stack: Stack) -> None:
    """What a client calls a model that is not served does not fill the log."""
    with pytest.raises(ModelNotFound):
        await consume(stack, model="x" * 100_000)
    assert stack.records[-1].model == "x" * 256


async def test_a_broken_sink_harms_nobody(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    """A sink that raises is logged; the request succeeds and the other sinks get the record."""

    def broken(_: Record) -> None:
        raise OSError("disk full")

    stack.gateway._sinks = (broken, *stack.gateway._sinks)
    assert await consume(stack)
    assert len(stack.records) == 1
    assert "a record could not be written" in caplog.text
