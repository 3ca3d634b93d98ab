"""What clients of the gRPC edge do that a client's library would not, on a socket of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from orchestrator.api import grpc_door, grpc_server
from orchestrator.errors import ModelNotFound

from ..conftest import eventually, serving, until
from ..fake_triton import FakeTriton, event
from .calls import ask, stub, told
from .test_grpc import incidents

METHOD = b"/inference.GRPCInferenceService/ServerMetadata"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, SETTINGS, END_HEADERS = 1, 4, 4
SECRET = b"Basic dXNlcjpodW50ZXIy\xff"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(*more: tuple[bytes, bytes]) -> bytes:
    """A call's headers, literal and without Huffman's code (RFC 7541, 6.2.2)."""
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", METHOD), (b":authority", b"x"), (b"te", b"trailers"),
        (b"content-type", b"application/grpc"), *more,
    ]  # fmt: skip
    return b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
    yield reader, writer
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_metadata_that_are_no_text_stay_out_of_the_log(
    fake: FakeTriton, caplog: pytest.LogCaptureFixture
) -> None:
    """A credential with a byte that is no UTF-8 is refused, and no line, nor one's exception, quotes it."""
    async with serving(fake, grpc=True, auth="keys") as stack, connected(stack.grpc) as (reader, writer):
        fields = headers((b"authorization", SECRET), (b"x-api-key", SECRET))
        writer.write(frame(HEADERS, END_HEADERS, 1, fields) + frame(0, 1, 1, b"\0\0\0\0\0"))
        answer = b""
        while b"grpc-status" not in answer:
            answer += await asyncio.wait_for(reader.read(4096), 5)
    assert b"API key" in answer
    assert SECRET[:-1].decode() not in caplog.text


async def test_who_leaves_while_we_write_is_no_fault_of_ours(
    fake: FakeTriton, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that are lost in the middle of a stream, where writing fails before grpc cancels the call, leave a
    cancelled request each: no error in the log, and no incident.
    """
    fake.script = [event("x" * 2000)] * 2000
    async with serving(fake, grpc=True, max_output_chars=10**8) as stack:
        seen = incidents(stack)
        for number in range(40):
            async with stub(stack.grpc) as calls:
                call = calls.ModelStreamInfer(iter([ask(f"p{number}", stream=True)]))
                for _ in range(3):
                    await call.read()
        await until(lambda: stack.gateway.in_flight == 0 and len(stack.records) == 40)
    assert {record.outcome for record in stack.records} == {"cancelled"}
    assert seen == []
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_calls_are_no_more_than_the_open_files_bear(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of HTTP's connections is the one of gRPC's calls: one more is RESOURCE_EXHAUSTED."""
    monkeypatch.setattr(grpc_server, "connections", lambda: 3)
    async with serving(fake, grpc=True) as stack, stub(stack.grpc) as calls:
        held = [calls.ModelStreamInfer() for _ in range(3)]
        for call in held:
            await call.initial_metadata()
        assert (await told(calls.ServerLive(pb.ServerLiveRequest())))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        held[0].cancel()
        await eventually(lambda: _lives(calls))


async def _lives(calls: Any) -> bool:
    return (await told(calls.ServerLive(pb.ServerLiveRequest())))[0] is grpc.StatusCode.OK


async def test_each_refused_request_of_a_stream_is_told_of(
    fake: FakeTriton, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With an error as the stream's status, too, each request that fails leaves an incident of its own id, behind one
    with a record and beside another that fails; a fault of ours is one line in the log.
    """
    metadata, waiting, both = (("triton_grpc_error", "true"), ("x-request-id", "s")), [], asyncio.Event()

    async def find(name: str) -> Any:
        waiting.append(name)
        if len(waiting) == 2:
            both.set()
        await both.wait()
        raise ModelNotFound(name) if name == "none" else RuntimeError

    async with serving(fake, grpc=True) as stack, stub(stack.grpc) as calls:
        seen = incidents(stack)
        call = calls.ModelStreamInfer(metadata=metadata)
        await call.write(ask())
        await call.read()
        await call.write(ask(model="none"))
        assert (await told(call))[0] is grpc.StatusCode.NOT_FOUND
        assert [record.id for record in stack.records] == ["s"] and [one.id for one in seen] == ["s-1"]
        monkeypatch.setattr(stack.gateway, "find", find)
        call = calls.ModelStreamInfer(iter([ask(model="none"), ask()]), metadata=metadata)
        assert (await told(call))[0] in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL)
    assert sorted((one.id, one.kind) for one in seen[1:]) == [("s", "not_found"), ("s-1", "internal")]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "request s-1 failed: RuntimeError"
    ]


async def test_a_call_without_a_message_is_not_held(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no key is refused before a message has come; where none is needed the message has to come in time."""
    monkeypatch.setattr(grpc_door, "MESSAGE_S", 0.3)
    async with serving(fake, grpc=True, auth="keys") as stack, grpc.aio.insecure_channel(stack.grpc) as channel:
        for method, code in (
            ("/inference.GRPCInferenceService/ModelInfer", grpc.StatusCode.UNAUTHENTICATED),
            ("/inference.GRPCInferenceService/ServerLive", grpc.StatusCode.DEADLINE_EXCEEDED),
            ("/grpc.health.v1.Health/Check", grpc.StatusCode.DEADLINE_EXCEEDED),
        ):
            call = channel.stream_unary(method)()
            assert await asyncio.wait_for(call.code(), 5) is code
        ended = channel.stream_unary("/grpc.health.v1.Health/Check")()
        await ended.done_writing()
        assert await ended.code() is grpc.StatusCode.INVALID_ARGUMENT
